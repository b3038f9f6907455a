"""How noisy gradients are, told by the loss: the trapezoid test.

Between the weights w - s and w the loss of one and the same batch changes by

    f - f_prev = (g + g_prev)^T s / 2 + O(|s|^3),

exactly so where it is quadratic, however badly conditioned. Losses and gradients of two
mini-batches differ by the noise of sampling besides, most often by many times as much. What is left
over, beside what the gradients foretold, so tells how far they can be trusted.
"""

from keras import ops

MEMORY = 0.9  # of the two running means of the test, and of that of the steps' length
LENGTH_MEMORY = 0.99  # of the gradient's length
ROUNDING = 1e-6  # relative error of a float32 loss
GROWTH = 2.0  # the longest step, beside the running mean


def trapezoid_test(loss, previous_loss, slope, previous_slope, left_over, foretold, updates):
    """One step of the test; all arguments are scalar tensors.

    Args:
        loss, previous_loss: f and f_prev.
        slope, previous_slope: g^T s and g_prev^T s.
        left_over, foretold: the running means so far.
        updates: the updates before this one.

    Returns:
        `(kappa, left_over, foretold)`: kappa in [0, 1] is 1 where losses do what the gradients
        foretell, and 0 where they do not and in the first update; and the new means.
    """
    # Relative to the loss: where it falls fast, its beginning would fill the means for long.
    error = ops.abs((loss - previous_loss - (slope + previous_slope) / 2) / loss)
    error = ops.maximum(error - ROUNDING, ops.zeros_like(error))
    size = (ops.abs(slope / loss) + ops.abs(previous_slope / loss)) / 2
    # There is a step to test from the second update on.
    memory = ops.where(updates > 1, ops.full_like(error, MEMORY), ops.zeros_like(error))
    known = (updates > 0) & ops.isfinite(error) & ops.isfinite(size)
    left_over = ops.where(known, memory * left_over + (1 - memory) * error, left_over)
    foretold = ops.where(known, memory * foretold + (1 - memory) * size, foretold)
    kappa = 1 - left_over / foretold
    kappa = ops.where(ops.isfinite(kappa), ops.clip(kappa, 0.0, 1.0), ops.zeros_like(kappa))
    return kappa, left_over, foretold


def length_factor(squared_norm, mean, first, kappa):
    """Keeps the length of noisy steps where a training begins, as gradients shrink.

    A gradient without noise tells how far to go. One of noise only tells a direction: the factor
    (||g_first|| / ||g||)^(1 - kappa), ||g||^2 a running mean, then takes its length away, as Adam
    does for each element.

    Args:
        squared_norm: scalar tensor, g^T g of this update.
        mean, first: scalar tensors, the running mean and the first g^T g; 0 before there is one.
        kappa: scalar tensor.

    Returns:
        `(factor, mean, first)`.
    """
    known = ops.isfinite(squared_norm)
    moved = LENGTH_MEMORY * mean + (1 - LENGTH_MEMORY) * squared_norm
    mean = ops.where(known, ops.where(mean > 0, moved, squared_norm), mean)
    first = ops.where(known & (first == 0), squared_norm, first)
    factor = ops.exp((1 - kappa) / 2 * (ops.log(first) - ops.log(mean)))
    return ops.where(ops.isfinite(factor), factor, ops.ones_like(factor)), mean, first


def length_cap(length, mean, momentum):
    """Shortens a direction that is much longer than those before it.

    Where gradients explode, or a beta near 1 meets a new direction, one long step can undo all, and
    so can the momentum that it leaves.

    Args:
        length: scalar tensor, the norm of the step without its learning rate, which schedules move.
        mean: scalar tensor, the running mean of it; 0 before there is one.
        momentum: float. The first step, z, is what constant gradients make 1 / (1 - momentum)
            times as long, and the mean begins there.

    Returns:
        `(cap, mean)`: the factor of the direction, at most 1.
    """
    known, longest = ops.isfinite(length), GROWTH * mean
    held = known & (mean > 0) & (length > longest)
    cap = ops.where(held, longest / length, ops.ones_like(length))
    moved = MEMORY * mean + (1 - MEMORY) * cap * length
    moved = ops.where(mean > 0, moved, length / (1 - momentum))
    return cap, ops.where(known, moved, mean)
