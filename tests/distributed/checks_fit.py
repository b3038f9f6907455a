"""What two Horovod workers must agree on in `fit` and its callbacks; run by run_checks.py."""

import time
import warnings

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from nlcg_tf.horovod.watch import A_STEP
from tests.distributed.training import BATCH, expect, make, shard_of
from tests.support.problems import (
    digits_data,
    digits_model,
    flat,
    regression_data,
    regression_model,
    relative_difference,
)


def check_a_model_that_is_not_built_cannot_be_broadcast():
    x, y = regression_data(BATCH)
    model = keras.Sequential([keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(NLCG(0.1))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    callbacks = [hvd.BroadcastVariables()]
    fit = lambda: model.fit(x, y, verbose=0, callbacks=callbacks)  # noqa: E731
    expect(ValueError, "keras.Input", fit)


def check_a_virtual_batch_goes_on_in_the_next_fit():
    """What a worker has accumulated when `fit` ends is its own, and stays so in the next one."""
    x, y = regression_data(6 * BATCH)
    ends = []
    for shard in (None, False, True):
        optimizer, model = NLCG(0.05, gradient_accumulation_steps=2), regression_model()
        mine = lambda values: values  # noqa: E731
        if shard is not None:
            optimizer = hvd.DistributedOptimizer(optimizer, shard=shard)
            # This worker's half of each micro-batch.
            mine = lambda values: np.concatenate(  # noqa: E731
                [shard_of(part) for part in np.split(values, 6)]
            )
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        size = BATCH if shard is None else BATCH // hvd.size()
        callbacks = [] if shard is None else [hvd.BroadcastVariables(), hvd.CheckIdentical()]
        for first in (0, 3):
            half = slice(first * size, (first + 3) * size)
            model.fit(
                mine(x)[half], mine(y)[half], size, shuffle=False, verbose=0, callbacks=callbacks
            )
            if shard is not None:
                saves = not shard or hvd.rank() == 0
                assert _is_warned_of_saving(optimizer) == (first == 0 and saves)
            if shard and first == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # must not leave the other worker waiting
                    error = RuntimeError if hvd.rank() else UserWarning
                    expect(error, "within a virtual batch", hvd.gather_optimizer, optimizer)
        ends.append(flat(model.trainable_variables))
    for end in ends[1:]:
        assert relative_difference(end, ends[0]) < 1e-5


def _is_warned_of_saving(optimizer):
    """Whether it says that the state has the accumulated gradients of one worker only."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if hasattr(optimizer, "division"):
            hvd.gather_optimizer(optimizer)
        else:
            optimizer.save_own_variables({})
    return any("within a virtual batch of 2 steps" in str(w.message) for w in caught)


def check_moving_statistics_are_averaged_by_the_callback():
    x, y = regression_data(BATCH)
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = hvd.DistributedOptimizer(NLCG(0.1))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    callbacks = [hvd.BroadcastVariables(), hvd.AverageMovingStatistics()]
    model.fit(shard_of(x), shard_of(y), verbose=0, validation_data=(x, y), callbacks=callbacks)
    hvd.check_identical([*model.variables, *optimizer.variables])


def check_metrics_are_summed_and_workers_compared_in_fit():
    """With unequal parts the logs are those of all examples, not the mean of two means."""
    x, y = digits_data(96)
    size = 64 if hvd.rank() == 0 else 32
    mine = slice(0, 64) if hvd.rank() == 0 else slice(64, 96)
    model = digits_model()
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    metrics = ["accuracy", keras.metrics.TopKCategoricalAccuracy(3, name="top3")]
    optimizer = hvd.DistributedOptimizer(NLCG(0.01))
    model.compile(optimizer=optimizer, loss=loss, metrics=metrics, jit_compile=False)
    callbacks = [hvd.WatchWorkers(), hvd.BroadcastVariables(), hvd.SumMetrics()]
    callbacks.append(hvd.CheckIdentical())
    history = model.fit(
        x[mine],
        y[mine],
        batch_size=size,
        epochs=2,
        verbose=0,
        callbacks=callbacks,
        validation_data=(x[mine], y[mine]),
        validation_freq=2,
    ).history
    model.compile(loss=loss, metrics=metrics, jit_compile=False)
    model.evaluate(x[mine], y[mine], verbose=0)
    summed = hvd.sum_metrics(model)
    whole = model.evaluate(x, y, verbose=0, return_dict=True)
    for name, value in whole.items():
        np.testing.assert_allclose(history[f"val_{name}"][0], value, rtol=1e-6)
        np.testing.assert_allclose(summed[name], value, rtol=1e-6)
    # The first epoch has one update and no evaluation, the second one both.
    assert len(history["accuracy"]) == 2 and len(history["val_accuracy"]) == 1
    for values in history.values():
        assert hvd.sum_over_workers(values) == [2 * value for value in values]
    assert history["accuracy"][1] * 96 == round(history["accuracy"][1] * 96, 4)


def check_a_worker_that_waits_for_its_input_is_not_taken_for_a_deadlock():
    """Within a virtual batch one worker may be at the end of an epoch long before the other."""

    class Slow(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 2 and hvd.rank() == 1:
                time.sleep(4)
            return regression_data(8)

    model = regression_model()
    optimizer = hvd.DistributedOptimizer(NLCG(0.1, gradient_accumulation_steps=4))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    callbacks = [hvd.WatchWorkers(1.5), hvd.BroadcastVariables(), hvd.SumMetrics()]
    model.fit(Slow(), verbose=0, callbacks=callbacks)
    assert int(optimizer._iterations) == 3


def check_the_watch_knows_in_which_steps_workers_wait():
    """Those with an average: the last of a virtual batch, or each with an `apply` of one's own."""
    for own, at_once, expected in ((0, 1, "...A...A.."), (0, 4, "AA."), (1, 1, "AAAAAAAAAA")):
        optimizer = (OwnApply if own else keras.optimizers.SGD)(gradient_accumulation_steps=4)
        model, watch, places = regression_model(), hvd.WatchWorkers(), []
        optimizer = hvd.DistributedOptimizer(optimizer)
        model.compile(optimizer, "mse", jit_compile=False, steps_per_execution=at_once)
        note = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs, w=watch, p=places: p.append(w._watch.place)
        )
        model.fit(*regression_data(80), batch_size=8, verbose=0, callbacks=[watch, note])
        assert "".join("A" if place == A_STEP else "." for place in places) == expected


def check_no_worker_waits_in_a_step_after_the_last():
    """Data of unknown length: Keras begins one more step, and never ends it."""
    x, y = regression_data(40)
    data = tf.data.Dataset.from_generator(
        lambda: zip(np.split(x, 5), np.split(y, 5)),
        output_signature=tuple(tf.TensorSpec((8, n)) for n in (4, 1)),
    )
    model, watch, places = regression_model(), hvd.WatchWorkers(), []
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    model.compile(optimizer, "mse", jit_compile=False)
    note = lambda *_: places.append(watch._watch.place)  # noqa: E731
    at_end = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: note())
    at_end.on_test_begin = lambda logs=None: note()
    model.fit(data, verbose=0, callbacks=[watch, at_end], validation_data=(x, y))
    assert places == ["", ""]
    model.evaluate(data, verbose=0, callbacks=[watch])


class OwnApply(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)


def check_a_worker_that_drifts_in_fit_is_named():
    x, y = regression_data(BATCH)
    model = regression_model()
    optimizer = hvd.DistributedOptimizer(make("fletcher_reeves", gradient_accumulation_steps=2))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)

    class Drift(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3 and hvd.rank() == 1:
                model.trainable_variables[1].assign_add(tf.ones(6))

    callbacks = [hvd.BroadcastVariables(), Drift(), hvd.CheckIdentical()]

    # Five micro-batches: the epoch ends within a virtual batch, whose sums differ as they should.
    def fit(callbacks):
        targets = y[:40] * (1 + hvd.rank())
        model.fit(x[:40], targets, batch_size=8, callbacks=callbacks, verbose=0)

    fit([callbacks[0], callbacks[2]])
    expect(RuntimeError, r"'sequential.*bias' on worker\(s\) \[1\]", fit, callbacks)


def check_a_saved_model_loads_as_the_plain_class():
    x, y = regression_data(BATCH)
    model = regression_model()
    model.compile(optimizer=hvd.DistributedOptimizer(NLCG(0.1)), loss="mse", jit_compile=False)
    model.fit(x, y, verbose=0)
    config = keras.saving.serialize_keras_object(model.optimizer)
    loaded = keras.saving.deserialize_keras_object(config)
    assert type(loaded) is NLCG and loaded.get_config() == model.optimizer.get_config()
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(sgd))
    assert type(loaded) is keras.optimizers.SGD


def check_unequal_work_is_refused():
    model = regression_model()
    optimizer = hvd.DistributedOptimizer(NLCG(0.1))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    x, y = regression_data(24 - 8 * hvd.rank())
    callbacks = [hvd.WatchWorkers(), hvd.BroadcastVariables()]
    fit = lambda: model.fit(x, y, batch_size=8, callbacks=callbacks, verbose=0)  # noqa: E731
    expect(ValueError, r"steps in an epoch \(worker 0: 3, worker 1: 2\)", fit)
    one = {"initial_epoch": hvd.rank(), "epochs": 2, "callbacks": callbacks, "verbose": 0}
    expect(ValueError, r"next epoch \(worker 0: 0, worker 1: 1\)", model.fit, x[:8], y[:8], **one)
    fit = lambda: model.fit(x[:8], y[:8], callbacks=callbacks[1:], verbose=0)  # noqa: E731
    sgd = keras.optimizers.SGD
    distributed = hvd.DistributedOptimizer(NLCG(0.1) if hvd.rank() else sgd())
    model.compile(optimizer=distributed, loss="mse", jit_compile=False)
    expect(ValueError, "optimizer .worker 0: DistributedSGD, worker 1: DistributedNLCG", fit)
    distributed = hvd.DistributedOptimizer(NLCG(0.1), shard=hvd.rank() == 1)
    model.compile(optimizer=distributed, loss="mse", jit_compile=False)
    expect(ValueError, "`shard` .worker 0: False, worker 1: True", fit)
    other = [keras.Variable(tf.ones(2 + hvd.rank()), name="a"), keras.Variable(1.0, name="b")]
    unequal = r"'a' has a value of float32 \(2,\) on worker 0 and .* \(3,\) on worker 1 \(1 such"
    expect(ValueError, unequal, hvd.broadcast, other)
    fewer = [other[1]] * (2 - hvd.rank())
    expect(ValueError, "has a value of .* worker 0 and none on worker 1", hvd.broadcast, fewer)
    model.compile(optimizer=sgd(), loss="mse")
    with warnings.catch_warnings(record=True) as caught:
        apart = lambda: model.fit(x[:8], y[:8], callbacks=callbacks, verbose=0)  # noqa: E731
        expect(RuntimeError, "drifted apart", apart)
    assert any("SGD is no `DistributedOptimizer`" in str(w.message) for w in caught)
    variables = [keras.Variable([1.0], name=name) for name in ("a", "b")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.apply(tf.ones((2, 1)), (v for v in variables))
    optimizer.apply([])  # as without workers
    assert [float(v[0]) for v in variables] == [0.0, 0.0]
    gradients = [tf.constant([1.0]), None if hvd.rank() else tf.constant([1.0])]
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    for plain in (NLCG(0.1), keras.optimizers.SGD(), scaled):
        optimizer = hvd.DistributedOptimizer(plain)
        optimizer.build(variables)
        getattr(optimizer, "observe_loss", lambda loss: None)(1.0)
        apply = lambda: optimizer.apply(gradients, variables)  # noqa: E731, B023
        for step in (apply, tf.function(apply)):
            expect(ValueError, "'b' has a gradient .* worker 0 and none on worker 1", step)
