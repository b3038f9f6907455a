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
    """Sum of all elements of `x`, in two stages whose order is fixed.

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


class Sums:
    """Sums over the elements of all variables, which this worker holds whole.

    A worker that holds a shard of them sums by a subclass, `nlcg_tf.horovod.sharding.SumsOfShards`.
    """

    is_divided = False

    def over_workers(self, own):
        """From sums over what this worker holds, a tensor, to those over all."""
        return own

    def sum(self, xs):
        """The sum of all elements of a list of tensors."""
        return self.over_workers(ops.sum(ops.stack([total(x) for x in xs])))

    def dot(self, xs, ys):
        """The inner product of two lists of tensors, taken as two long vectors."""
        return self.sum([x * y for x, y in zip(xs, ys)])

    def count(self, xs):
        """How many elements a list of tensors has, an int."""
        return sum(math.prod(x.shape) for x in xs)

    def all_finite(self, xs):
        """True where no element of any tensor is infinite or NaN: a scalar boolean tensor."""
        return ops.all(ops.stack([ops.all(ops.isfinite(x)) for x in xs]))

    def pieces(self, shards):
        """The whole variables, or what has their shapes, that make up this worker's shards."""
        return shards

    def join(self, tensors):
        """The shards that `pieces` took apart."""
        return tensors
