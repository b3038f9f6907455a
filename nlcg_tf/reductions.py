"""Sums over all variables of a model whose bits do not depend on the number of threads."""

import contextlib
import contextvars
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


def norm(x):
    """The Frobenius norm of a tensor of any shape, a scalar."""
    return ops.sqrt(total(x * x))


# Where each worker updates a shard: what makes its sums those over all workers.
_shards = contextvars.ContextVar("shards", default=None)


@contextlib.contextmanager
def over_workers(shards):
    """Context in which each worker holds a shard of the parameters, and sums run over all.

    Args:
        shards: object with `elements`, how many there are in all shards, and with `sum(x)`, from
            sums over this worker's shard to those over all; and with `pieces(xs)`, from the shards
            to the whole variables that make them up, and `join(xs)`, back again.
    """
    token = _shards.set(shards)
    try:
        yield
    finally:
        _shards.reset(token)


def are_divided():
    """Whether this worker holds a shard of the parameters only."""
    return _shards.get() is not None


def pieces(shards):
    """The variables, or what has their shapes, that make up this worker's shards."""
    return _shards.get().pieces(shards) if are_divided() else shards


def join(tensors):
    """The shards that `pieces` took apart."""
    return _shards.get().join(tensors) if are_divided() else tensors


def sum_of_shards(own):
    """From sums over this worker's shard to those over all shards."""
    return _shards.get().sum(own)


def sum_all(xs):
    """The sum of all elements of a list of tensors."""
    own = ops.sum(ops.stack([total(x) for x in xs]))
    return sum_of_shards(own) if are_divided() else own


def dot(xs, ys):
    """The inner product of two lists of tensors, taken as two long vectors."""
    return sum_all([x * y for x, y in zip(xs, ys)])


def count(xs):
    """How many elements a list of tensors has, an int."""
    return _shards.get().elements if are_divided() else sum(math.prod(x.shape) for x in xs)


def all_finite(tensors):
    """True where no element of any tensor is infinite or NaN: a scalar boolean tensor."""
    finite = ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in tensors]))
    return sum_of_shards(ops.cast(~finite, "float32")) == 0 if are_divided() else finite
