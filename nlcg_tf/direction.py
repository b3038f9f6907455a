"""Formulas for beta, the weight of the past direction in the new one.

`fletcher_reeves` and `polak_ribiere` are those of Adya, Palakkode & Tuzel 2018, Algorithm 1.
`blended` is this package's own. The rule `"momentum"` is a constant and needs no function.

With the gradient g and the preconditioner P, delta_new is g^T P g. delta is the delta_new of the
previous update. delta_mid is g^T P g_prev, with the previous gradient g_prev.
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


def blended(delta_new, delta, gain_ratio, momentum):
    """beta = gain_ratio beta_FR + (1 - gain_ratio) momentum.

    With noisy gradients Fletcher-Reeves' ratio stays near 1, whatever the weights do.

    Args:
        delta_new, delta: scalar tensors.
        gain_ratio: scalar tensor in [0, 1], of `nlcg_tf.noise`.
        momentum: float in [0, 1), beta where gradients are nothing but noise.
    """
    return gain_ratio * fletcher_reeves(delta_new, delta) + (1 - gain_ratio) * momentum


def _clip(beta):
    # Where the sums overflowed (inf / inf) the direction starts again from steepest descent.
    return ops.where(ops.isfinite(beta), ops.clip(beta, 0.0, 1.0), ops.zeros_like(beta))
