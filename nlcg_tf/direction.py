"""The conjugate direction's beta (Adya, Palakkode & Tuzel 2018, Algorithm 1), and a third rule.

delta_new is r^T z, the new residual r = -g times its preconditioned self z; delta is that number of
the update before; delta_mid is the new residual times the old preconditioned one.
"""

from keras import ops

RULES = ("fletcher_reeves", "polak_ribiere", "blended")


def fletcher_reeves(delta_new, delta, epsilon):
    """beta = delta_new / delta, clipped to [0, 1]."""
    return _clip(delta_new / (delta + epsilon))


def polak_ribiere(delta_new, delta_mid, delta, epsilon):
    """beta = (delta_new - delta_mid) / delta, clipped to [0, 1]."""
    return _clip((delta_new - delta_mid) / (delta + epsilon))


def blended(fletcher_reeves_beta, kappa, momentum):
    """beta between that of Fletcher-Reeves, where gradients are clean, and a constant.

    Two gradients that point the same way share no noise, so kappa tells how far the ratio of delta
    can be trusted; in noise it is near 1, or clipped there, whatever the weights do.

    Args:
        fletcher_reeves_beta: scalar tensor.
        kappa: scalar tensor in [0, 1], the `agreement` of the last two gradients.
        momentum: float in [0, 1), beta where gradients are nothing but noise.
    """
    return kappa * fletcher_reeves_beta + (1 - kappa) * momentum


def agreement(inner_product, squared_norm, previous_squared_norm):
    """kappa: the cosine of two gradients, clipped to [0, 1]; 0 where one of them vanishes."""
    return _clip(inner_product / ops.sqrt(squared_norm) / ops.sqrt(previous_squared_norm))


def _clip(x):
    # Where the sums overflowed (inf / inf) the direction starts again from steepest descent.
    return ops.where(ops.isfinite(x), ops.clip(x, 0.0, 1.0), ops.zeros_like(x))
