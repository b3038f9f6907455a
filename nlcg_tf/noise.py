"""The gain ratio, which measures the noise in the gradients; and two limits on the step's length.

When the weights move from w - s to w, the loss of a fixed batch changes by

    f - f_prev = (g + g_prev)^T s / 2 + O(|s|^3).

For a quadratic loss this is exact. The losses of two different mini-batches also differ by sampling
noise, which is often many times as large. The gain ratio is 1 - error / change, where error is the
mean error of this prediction and change is the mean predicted change.
"""

from keras import ops

MEMORY = 0.9  # of the two running means of the gain ratio, and of that of the updates' norm
NORM_MEMORY = 0.99  # of the squared gradient norm
OUTLIER = 100.0  # the largest squared gradient norm that counts, beside the running mean
ROUNDING = 1e-6  # relative error of a float32 loss
GROWTH = 2.0  # the longest update, beside the running mean


def measure_gain_ratio(
    loss, last_loss, slope, last_slope, prediction_error, predicted_change, updates
):
    """How well the gradients predicted the last change of the loss.

    A constant that is added to the loss changes nothing but its rounding. Weight decay and gradient
    clipping count as noise: s, which is made again from d, has no decay in it, and the optimizer
    sees the clipped gradients only.

    Args:
        loss, last_loss: scalar tensors, f and f_prev.
        slope, last_slope: scalar tensors, g^T s and g_prev^T s.
        prediction_error, predicted_change: scalar tensors, the running means so far.
        updates: scalar tensor, the number of updates before this one.

    Returns:
        `(gain_ratio, prediction_error, predicted_change)`, scalar tensors: the ratio, in [0, 1] and
        0 in the first update, and the new means.
    """
    error = ops.abs(loss - last_loss - (slope + last_slope) / 2) - ROUNDING * ops.abs(loss)
    error = ops.maximum(error, ops.zeros_like(error))
    change = (ops.abs(slope) + ops.abs(last_slope)) / 2
    # There is a step to test from the second update on.
    memory = ops.where(updates > 1, ops.full_like(error, MEMORY), ops.zeros_like(error))
    known = (updates > 0) & ops.isfinite(error) & ops.isfinite(change)

    def mean(old, new):
        return ops.where(known, memory * old + (1 - memory) * new, old)

    prediction_error = mean(prediction_error, error)
    predicted_change = mean(predicted_change, change)
    ratio = 1 - prediction_error / predicted_change
    ratio = ops.where(ops.isfinite(ratio), ops.clip(ratio, 0.0, 1.0), ops.zeros_like(ratio))
    return ratio, prediction_error, predicted_change


def norm_factor(squared_norm, mean, first, gain_ratio):
    """Gradient-norm normalization, as far as gradients are noise.

    The length of a gradient without noise tells how far to go. That of a noisy one tells little:
    (||g_first|| / ||g||)^(1 - gain_ratio), with ||g||^2 a running mean, keeps updates as long as at
    the beginning of the training while gradients shrink, as Adam does for each element. In the mean
    one huge gradient counts for a hundred times the mean at most, or updates would stay short for a
    thousand updates.

    Args:
        squared_norm: scalar tensor, g^T g of this update.
        mean, first: scalar tensors, the running mean and the first g^T g; 0 before there is one.
        gain_ratio: scalar tensor.

    Returns:
        `(factor, mean, first)`, scalar tensors.
    """
    known = ops.isfinite(squared_norm)
    bounded = ops.minimum(squared_norm, OUTLIER * mean)
    moved = NORM_MEMORY * mean + (1 - NORM_MEMORY) * bounded
    mean = ops.where(known, ops.where(mean > 0, moved, squared_norm), mean)
    first = ops.where(known & (first == 0), squared_norm, first)
    factor = ops.exp((1 - gain_ratio) / 2 * (ops.log(first) - ops.log(mean)))
    return ops.where(ops.isfinite(factor), factor, ops.ones_like(factor)), mean, first


def update_clip(norm, mean, momentum):
    """Clips an update that is much longer than those before it.

    Where gradients explode, or a beta near 1 meets a new direction, one long step can undo a
    training, and so can the momentum that it leaves.

    Args:
        norm: scalar tensor, of the update without its learning rate, which schedules move.
        mean: scalar tensor, the running mean of it; 0 before there is one.
        momentum: float. Constant gradients make the first update 1 / (1 - momentum) times as long
            in the end, and the mean begins there.

    Returns:
        `(factor, mean)`, scalar tensors: the factor of the update and of d is at most 1, and 0 for
        an update whose norm overflows.
    """
    known, longest = ops.isfinite(norm), GROWTH * mean
    clipped = (mean > 0) & (norm > longest)
    factor = ops.where(clipped, longest / norm, ops.ones_like(norm))
    factor = ops.where(known, factor, ops.zeros_like(norm))
    moved = MEMORY * mean + (1 - MEMORY) * factor * norm
    moved = ops.where(mean > 0, moved, norm / (1 - momentum))
    return factor, ops.where(known, moved, mean)
