"""Which example stands where: the same ones in an update, whatever the number of workers."""

import numpy as np


def epoch_indices(examples, count, seed, epoch):
    """The examples of an epoch in their order: permutations of all, one after another.

    Args:
        examples: number of training examples.
        count: how many indices are needed; more than `examples` if one batch is larger than that.
        seed, epoch: ints, which alone decide the order.
    """
    passes = -(-count // examples)
    orders = [np.random.default_rng([seed, epoch, i]).permutation(examples) for i in range(passes)]
    return np.concatenate(orders)[:count]


def own_places(plan, rank, first_update):
    """The places in an epoch's order of a worker's examples, in the order in which it takes them.

    Update u takes examples [u B, (u + 1) B) of the epoch's order, and worker r the r-th of the W
    equal parts of these: so a virtual batch holds the same examples as a real one.

    Args:
        plan: a `BatchPlan`.
        rank: int, this worker's number.
        first_update: int, the update of the epoch to begin with.

    Returns:
        int64 array.
    """
    part = plan.micro_steps * plan.per_worker_batch_size
    places = np.arange(plan.updates_per_epoch * plan.global_batch_size)
    places = places.reshape(plan.updates_per_epoch, plan.workers, part)
    return places[first_update:, rank].ravel()


def without_autotuning(dataset):
    """A dataset whose parallelism stays as it begins: one call a core, at most 16.

    The end of an autotuned iterator can wait for its tuner's next period, up to a minute: the tuner
    is told to stop before the flag at which it looks is set (TensorFlow 2.21).
    """
    import tensorflow as tf  # the order alone is wanted where there is none

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)
