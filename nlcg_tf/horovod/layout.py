"""How the variables of a model are divided among workers: one flat vector for each kind of them."""

import dataclasses
import math

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Layout:
    """Variables of one dtype, end to end as one vector, of which each worker has a part.

    All parts have the same `length`, but for the last ones, which may end early or be empty: zeros
    that fill them up are sent, never kept.

    Attributes:
        indices: tuple of ints, which of the model's trainable variables these are.
        shapes: tuple of their shapes.
        dtype: their dtype, a string.
        decays: whether weight decay applies to them.
        workers, rank: ints.
    """

    indices: tuple
    shapes: tuple
    dtype: str
    decays: bool
    workers: int
    rank: int

    @property
    def sizes(self):
        return [math.prod(shape) for shape in self.shapes]

    @property
    def elements(self):
        return sum(self.sizes)

    @property
    def length(self):
        return -(-self.elements // self.workers)

    def range(self):
        """First element of this worker's part, and the one after its last."""
        begin = min(self.rank * self.length, self.elements)
        return begin, min(begin + self.length, self.elements)

    def flatten(self, tensors):
        """The whole vector, filled up to `workers * length` elements."""
        fill = tf.zeros([self.workers * self.length - self.elements], self.dtype)
        return tf.concat([*(tf.reshape(x, [-1]) for x in tensors), fill], axis=0)

    def own_part(self, tensors):
        """This worker's part of the vector that the tensors make up."""
        (begin, end), at, parts = self.range(), 0, []
        for x, size in zip(tensors, self.sizes):
            first, last = max(begin - at, 0), min(end - at, size)
            if first < last:
                parts.append(tf.reshape(x, [-1])[first:last])
            at += size
        return tf.concat(parts, axis=0) if parts else tf.zeros([0], self.dtype)

    def fill(self, part):
        """A worker's part, filled up to `length` elements."""
        begin, end = self.range()
        missing = self.length - (end - begin)
        return tf.pad(part, [[0, missing]]) if missing else part

    def restore(self, vector):
        """The tensors of which `flatten` made a vector."""
        parts = tf.split(vector[: self.elements], self.sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes)]


def divide(variables, decays, workers, rank):
    """The layouts of a model's trainable variables.

    Args:
        variables: list of Keras variables.
        decays: function of a variable: whether weight decay applies to it.
        workers, rank: ints.
    """
    kinds = {}
    for i, variable in enumerate(variables):
        kinds.setdefault((variable.dtype, decays(variable)), []).append(i)
    return [
        Layout(
            tuple(indices),
            tuple(tuple(variables[i].shape) for i in indices),
            dtype,
            decayed,
            workers,
            rank,
        )
        for (dtype, decayed), indices in kinds.items()
    ]
