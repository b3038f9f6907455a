"""Polar factors of which each worker computes some."""

import math

import horovod.tensorflow as hvd
import tensorflow as tf

from nlcg_tf.horovod.collectives import gather
from nlcg_tf.polar import operations


def owners(shapes, workers):
    """Which worker computes the factor of each matrix: the largest first, to the least loaded."""
    loads, chosen = [0] * workers, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -operations(shapes[i])):
        chosen[i] = loads.index(min(loads))
        loads[chosen[i]] += operations(shapes[i])
    return chosen


def share(matrices, compute):
    """For `nlcg_tf.polar.shared_by`: all workers get the bits that one of them computed."""
    if hvd.size() == 1 or not matrices:
        return compute(matrices)
    shapes = [tuple(x.shape) for x in matrices]
    chosen = owners(shapes, hvd.size())
    own = compute([x for x, owner in zip(matrices, chosen) if owner == hvd.rank()])
    empty = tf.zeros([0], matrices[0].dtype)
    (vector,) = gather([tf.concat([empty, *(tf.reshape(x, [-1]) for x in own)], axis=0)])
    order = sorted(range(len(shapes)), key=chosen.__getitem__)
    factors = list(matrices)
    for i, part in zip(order, tf.split(vector, [math.prod(shapes[i]) for i in order])):
        factors[i] = tf.reshape(part, shapes[i])
    return factors
