"""The conjugate direction's beta (Adya, Palakkode & Tuzel 2018, Algorithm 1), and a third rule.

The fourth, `"momentum"`, is a constant.

delta_new is r^T z, the new residual r = -g times its preconditioned self z; delta is that number of
the update before; delta_mid is the new residual times the old preconditioned one.
"""

from keras import ops

from nlcg_tf.reductions import TINY

RULES = ("fletcher_reeves", "polak_ribiere", "blended", "momentum")


def fletcher_reeves(delta_new, delta):
    """beta = delta_new / delta, clipped to [0, 1]."""
    return _clip(delta_new / (delta + TINY))


def polak_ribiere(delta_new, delta_mid, delta):
    """beta = (delta_new - delta_mid) / delta, clipped to [0, 1]."""
    return _clip((delta_new - delta_mid) / (delta + TINY))


def blended(delta_new, delta, kappa, momentum):
    """beta = kappa beta_FR + (1 - kappa) momentum.

    Of noisy gradients the ratio of delta is near 1, or clipped there, whatever the weights do.

    Args:
        delta_new, delta: scalar tensors.
        kappa: scalar tensor in [0, 1], how far gradients can be trusted.
        momentum: float in [0, 1), beta where gradients are nothing but noise.
    """
    return kappa * fletcher_reeves(delta_new, delta) + (1 - kappa) * momentum


def _clip(beta):
    # Where the sums overflowed (inf / inf) the direction starts again from steepest descent.
    return ops.where(ops.isfinite(beta), ops.clip(beta, 0.0, 1.0), ops.zeros_like(beta))
