"""Training on one worker and on two, for the checks."""

import keras
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from nlcg_tf.horovod.averaging import Averaging
from tests.support.problems import (
    paper_nlcg,
)

UPDATES, BATCH = 20, 64
RULES = ("fletcher_reeves", "polak_ribiere", "blended")


def make(name, **arguments):
    if name == "momentum":
        return keras.optimizers.SGD(0.05, momentum=0.9, **arguments)
    if name == "rmsprop":
        return keras.optimizers.RMSprop(0.01, rho=0.9, momentum=0.9, epsilon=1.0, **arguments)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.05, UPDATES, 0.01)
    if name == "blended":
        return NLCG(schedule, **arguments)
    return paper_nlcg(schedule, name, **arguments)


def shard_of(x):
    """This worker's part of a batch."""
    return x[hvd.rank() * len(x) // 2 : (hvd.rank() + 1) * len(x) // 2]


def trained(optimizer, model, loss, x, y, micro_batches=1, callbacks=(), **compile_arguments):
    distributed = isinstance(optimizer, Averaging)
    if distributed:
        x, y = shard_of(x), shard_of(y)
    if hvd.rank() == 1 and distributed:
        # Workers that start apart must be brought together by the broadcast.
        model.set_weights([w + 1 for w in model.get_weights()])
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False, **compile_arguments)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(len(x) // micro_batches).repeat()
    steps = UPDATES * micro_batches
    callbacks = [hvd.BroadcastVariables(), *callbacks] if distributed else []
    model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
    return model


def expect(kind, pattern, function, *arguments, **keywords):
    import re

    try:
        function(*arguments, **keywords)
    except kind as error:
        assert re.search(pattern, str(error), re.S), (pattern, str(error))
    else:
        raise AssertionError(f"{function} raised no {kind.__name__}")
