"""Sums over all variables of a model whose bits do not depend on the number of threads."""

import math

from keras import ops

# A row is summed by one thread, and so is a vector of row sums; only a longer reduction would be
# cut into as many pieces as there are threads.
BLOCK = 4096

# What keeps a quotient of sums finite: far below what any training comes to, since sums shrink with
# the square of the gradients.
TINY = 1e-30


def total(x):
    """Sum of all elements of `x`, in two stages of fixed order (design, section 2).

    Args:
        x: tensor of any shape, float32 or float64.

    Returns:
        A scalar tensor of the dtype of `x`.
    """
    size = math.prod(x.shape)
    rows, rest = divmod(size, BLOCK)
    if rows == 0 or (rows == 1 and rest == 0):
        return ops.sum(x)
    x = ops.reshape(x, (-1,))
    head = ops.sum(ops.sum(ops.reshape(x[: rows * BLOCK], (rows, BLOCK)), axis=1))
    return head + ops.sum(x[rows * BLOCK :]) if rest else head


def dot(xs, ys):
    """The inner product of two lists of tensors, taken as two long vectors."""
    return ops.sum(ops.stack([total(x * y) for x, y in zip(xs, ys)]))


def all_finite(tensors):
    """True where no element of any tensor is infinite or NaN: a scalar boolean tensor."""
    return ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in tensors]))
