"""Keras' `fit` on a small problem, and the oracle beside it."""

import numpy as np
import tensorflow as tf

from tests.support.problems import FollowGradients, flat

BATCH, UPDATES = 16, 8


def weights_of(model):
    return flat(v.numpy() for v in model.trainable_variables)


def follow(model, optimizer, x, y, batch=BATCH, updates=UPDATES, rates=None, **arguments):
    """The oracle's weights after `updates` updates on consecutive batches, wrapping around."""
    reference = FollowGradients(model, optimizer)
    for t in range(updates):
        rows = np.arange(t * batch, (t + 1) * batch) % len(x)
        rate = 0.05 if rates is None else rates[t]
        reference.update(x[rows], y[rows], float(np.float32(rate)), **arguments)
    return reference.oracle


def fit(model, optimizer, x, y, batch=BATCH, updates=UPDATES, **arguments):
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(batch).repeat()
    model.fit(batches, steps_per_epoch=updates, epochs=1, verbose=0)
