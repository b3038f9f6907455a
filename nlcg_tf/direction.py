"""The conjugate direction's beta (Adya, Palakkode & Tuzel 2018, Algorithm 1).

delta_new is r^T z, the new residual r = -g times its preconditioned self z; delta is that number of
the update before; delta_mid is the new residual times the old preconditioned one.
"""

from keras import ops


def fletcher_reeves(delta_new, delta_mid, delta, epsilon):
    """beta = delta_new / delta, clipped to [0, 1]. `delta_mid` is not used."""
    del delta_mid
    return _clip(delta_new / (delta + epsilon))


def polak_ribiere(delta_new, delta_mid, delta, epsilon):
    """beta = (delta_new - delta_mid) / delta, clipped to [0, 1]."""
    return _clip((delta_new - delta_mid) / (delta + epsilon))


def _clip(beta):
    # Where the sums overflowed (inf / inf) the direction starts again from steepest descent.
    return ops.where(ops.isfinite(beta), ops.clip(beta, 0.0, 1.0), ops.zeros_like(beta))


RULES = {"fletcher_reeves": fletcher_reeves, "polak_ribiere": polak_ribiere}
