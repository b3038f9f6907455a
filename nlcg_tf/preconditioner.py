"""The diagonal BFGS preconditioner (Adya, Palakkode & Tuzel 2018, section 3.2.1).

Pure functions of lists of tensors, one entry a variable; the inner products run over all of them.
"""

from keras import ops

from nlcg_tf.reductions import dot


def bfgs(h, y, s, epsilon):
    """Diagonal of the BFGS update of the Hessian estimate.

    Args:
        h: list of tensors, the diagonal before the update.
        y: list of tensors of the same shapes, gradient minus previous gradient.
        s: list of tensors of the same shapes, the step that was taken between the two.
        epsilon: float, the least curvature that is trusted; also added to the denominators.

    Returns:
        `(h_new, ys, accepted)`: the new diagonal, the curvature y^T s, and a scalar boolean that is
        False where the pair (y, s) was rejected and `h_new` is `h`.
    """
    hs = [h_i * s_i for h_i, s_i in zip(h, s)]
    ys = dot(y, s)
    shs = dot(s, hs)
    # The paper has no guard; its authors' released code refuses non-positive curvature.
    accepted = (ys > epsilon) & (shs > epsilon) & ops.isfinite(ys) & ops.isfinite(shs)

    def update(h_i, hs_i, y_i):
        # Each square is divided as it is formed: y^2 alone overflows float32 beyond 1.8e19. An
        # element that overflows all the same keeps its value: an infinite h would never come back.
        candidate = h_i - hs_i * (hs_i / (shs + epsilon)) + y_i * (y_i / (ys + epsilon))
        return ops.where(accepted & ops.isfinite(candidate), ops.abs(candidate), h_i)

    return [update(*entry) for entry in zip(h, hs, y)], ys, accepted
