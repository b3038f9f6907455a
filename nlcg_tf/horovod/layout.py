"""How the variables of a model are divided among workers: as flat vectors."""

import dataclasses
import math

import keras
import tensorflow as tf

from nlcg_tf.horovod.collectives import lengths_of_parts
from nlcg_tf.polar import matrix_shape, operations

# Elements of a vector of several variables. The memory of much longer ones is given back to the
# system after each use, and the first touch of new memory takes longer than the arithmetic.
LONGEST = 2**22


@dataclasses.dataclass(frozen=True)
class Layout:
    """Variables of one kind, end to end as one vector, of which each worker has a shard.

    The shards differ in length by one at most, or hold whole variables; where there are more
    workers than elements or variables, some are empty.

    Attributes:
        indices: tuple of ints, which of the model's trainable variables these are.
        shapes: tuple of their shapes.
        dtype: their dtype, a string.
        decays: whether weight decay applies to them.
        whole: whether no variable is cut.
        workers, rank: ints.
    """

    indices: tuple
    shapes: tuple
    dtype: str
    decays: bool
    whole: bool
    workers: int
    rank: int

    @property
    def sizes(self):
        return [math.prod(shape) for shape in self.shapes]

    @property
    def elements(self):
        return sum(self.sizes)

    @property
    def lengths(self):
        """Elements of each worker's shard."""
        if not self.whole:
            return lengths_of_parts(self.elements, self.workers)
        lengths = [0] * self.workers
        for owner, size in zip(self._owners, self.sizes):
            lengths[owner] += size
        return lengths

    @property
    def _owners(self):
        """Which worker has each whole variable: in order, with about as much work for each."""
        costs = [operations(matrix_shape(shape)) for shape in self.shapes]
        total, before, owners = sum(costs), 0, []
        for cost in costs:
            middle = (before + cost / 2) / max(total, 1)
            owners.append(min(int(self.workers * middle), self.workers - 1))
            before += cost
        return owners

    @property
    def own_shapes(self):
        """The shapes of the whole variables that this worker's shard holds."""
        return [s for s, owner in zip(self.shapes, self._owners) if owner == self.rank]

    def range(self):
        """First element of this worker's shard, and the one after its last."""
        begin = sum(self.lengths[: self.rank])
        return begin, begin + self.lengths[self.rank]

    def flatten(self, tensors):
        """The whole vector."""
        return tf.concat([tf.reshape(x, [-1]) for x in tensors], axis=0)

    def own_shard(self, tensors):
        """This worker's shard of the vector that the tensors make up."""
        (begin, end), at, parts = self.range(), 0, []
        for x, size in zip(tensors, self.sizes):
            first, last = max(begin - at, 0), min(end - at, size)
            if first < last:
                parts.append(tf.reshape(x, [-1])[first:last])
            at += size
        return tf.concat(parts, axis=0) if parts else tf.zeros([0], self.dtype)

    def restore(self, vector):
        """The tensors of which `flatten` made a vector."""
        parts = tf.split(vector, self.sizes)
        return [tf.reshape(part, shape) for part, shape in zip(parts, self.shapes)]


def divide(variables, decays, whole, workers, rank):
    """The layouts of a model's trainable variables, in order, each of one dtype and decay.

    Args:
        variables: list of Keras or TensorFlow variables.
        decays: function of a variable: whether weight decay applies to it.
        whole: whether no variable is cut.
        workers, rank: ints.
    """
    groups, open_, elements = [], {}, {}
    for i, variable in enumerate(variables):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        kind, size = (dtype, decays(variable)), math.prod(variable.shape)
        if kind not in open_ or elements[kind] + size > LONGEST:
            open_[kind], elements[kind] = [], 0
            groups.append((kind, open_[kind]))
        open_[kind].append(i)
        elements[kind] += size
    return [
        Layout(tuple(xs), tuple(tuple(variables[i].shape) for i in xs), *kind, whole, workers, rank)
        for kind, xs in groups
    ]
