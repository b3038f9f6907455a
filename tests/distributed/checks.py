"""What two Horovod workers must agree on; run by test_horovod.py under horovodrun.

Each worker trains the reference by itself, on the whole batch with the plain optimizer, and then
its own part of the batch with the distributed one. One process runs all checks: starting workers
costs more than any of them.
"""

import sys
import traceback

import keras
import numpy as np
import tensorflow as tf
from problems import flat, regression_data, regression_model, relative_difference

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG

UPDATES, BATCH = 20, 64


def make(name, **arguments):
    if name == "momentum":
        return keras.optimizers.SGD(0.05, momentum=0.9, **arguments)
    if name == "rmsprop":
        return keras.optimizers.RMSprop(0.01, rho=0.9, momentum=0.9, epsilon=1.0, **arguments)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.05, UPDATES, 0.01)
    return NLCG(schedule, name, **arguments)


def trained(optimizer, x, y, micro_batches, dtype, **compile_arguments):
    model = regression_model(dtype=dtype, units=64)
    if hvd.rank() == 1 and isinstance(optimizer, hvd._Distributed):
        # Workers that start apart must be brought together by the broadcast.
        model.set_weights([w + 1 for w in model.get_weights()])
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False, **compile_arguments)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(len(x) // micro_batches).repeat()
    steps = UPDATES * micro_batches
    callbacks = [hvd.BroadcastVariables()] if isinstance(optimizer, hvd._Distributed) else []
    model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=callbacks)
    return model


def check_virtual_batch_equals_real_batch():
    for dtype, bound in (("float32", 2e-5), ("float64", 1e-11)):
        keras.config.set_floatx(dtype)
        x, y = regression_data(BATCH, dtype)
        part = slice(hvd.rank() * BATCH // 2, (hvd.rank() + 1) * BATCH // 2)
        for name in ("fletcher_reeves", "polak_ribiere", "momentum", "rmsprop"):
            arguments = {"global_clipnorm": 0.5, "weight_decay": 0.01}
            expected = flat(trained(make(name, **arguments), x, y, 1, dtype).get_weights())
            for steps in (None, 2):
                optimizer = make(name, gradient_accumulation_steps=steps, **arguments)
                model = trained(
                    hvd.DistributedOptimizer(optimizer), x[part], y[part], steps or 1, dtype
                )
                difference = relative_difference(flat(model.get_weights()), expected)
                assert difference < bound, (dtype, name, steps, difference)
                hvd.check_identical([*model.variables, *optimizer.variables])
    keras.config.set_floatx("float32")


def check_custom_loop_eager_and_graph():
    x, y = regression_data(BATCH)
    part = slice(hvd.rank() * BATCH // 2, (hvd.rank() + 1) * BATCH // 2)
    expected = flat(trained(make("fletcher_reeves"), x, y, 1, None).get_weights())
    for graph in (False, True):
        model = regression_model(units=64)
        optimizer = hvd.DistributedOptimizer(make("fletcher_reeves"))
        optimizer.build(model.trainable_variables)

        def step(x, y, model=model, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            optimizer.observe_loss(loss)
            optimizer.apply(tape.gradient(loss, model.trainable_variables))

        step = tf.function(step) if graph else step
        for _ in range(UPDATES):
            step(x[part], y[part])
        difference = relative_difference(flat(model.get_weights()), expected)
        assert difference < 2e-5, (graph, difference)


def check_compression():
    x, y = regression_data(BATCH)
    part = slice(hvd.rank() * BATCH // 2, (hvd.rank() + 1) * BATCH // 2)
    exact = flat(trained(make("fletcher_reeves"), x, y, 1, None).get_weights())
    optimizer = hvd.DistributedOptimizer(make("fletcher_reeves"), "fp16")
    model = trained(optimizer, x[part], y[part], 1, None)
    assert 0 < relative_difference(flat(model.get_weights()), exact) < 0.01
    hvd.check_identical([*model.variables, *optimizer.variables])


def check_a_drifted_worker_is_named():
    variables = [keras.Variable([1.0, 2.0], name=f"v{i}") for i in range(3)]
    hvd.check_identical(variables)
    if hvd.rank() == 1:
        variables[1].assign([1.0, 2.0000002])
    expect(RuntimeError, r"variable 'v1' on worker\(s\) \[1\]", hvd.check_identical, variables)


def check_sums_and_moving_statistics():
    assert hvd.sum_over_workers([1, hvd.rank(), 2**53 - 2]) == [2, 1, 2.0 * (2**53 - 2)]
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    mean = model.layers[0].moving_mean
    mean.assign([float(hvd.rank()), 3.0])
    hvd.average_moving_statistics(model)
    np.testing.assert_array_equal(mean.numpy(), [0.5, 3.0])


def check_loss_scaling_skips_on_all_workers_or_none():
    """A gradient that overflows on one worker only must not be applied on the other."""
    variable, inner = keras.Variable([1.0, 2.0]), NLCG(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(optimizer)
    optimizer.build([variable])
    for worker in (None, 1, None):
        gradient = [np.inf, 8.0] if worker == hvd.rank() else [8.0, 8.0]
        optimizer.scale_loss(tf.constant(1.0))
        optimizer.apply([tf.constant(gradient)], [variable])
    assert inner.diagnostics()["updates"] == 2
    hvd.check_identical([variable, *optimizer.variables])


def check_a_nan_on_one_worker_is_skipped_on_all():
    variable, optimizer = keras.Variable([1.0, 2.0]), hvd.DistributedOptimizer(NLCG(0.1))
    optimizer.build([variable])
    for bad in (None, "gradient", "loss"):
        mine = hvd.rank() == 1
        optimizer.observe_loss(np.nan if bad == "loss" and mine else 1.0)
        gradient = [np.nan if bad == "gradient" and mine else 1.0, 1.0]
        optimizer.apply([tf.constant(gradient)], [variable])
    assert optimizer.diagnostics()["skipped_updates"] == 2
    hvd.check_identical([variable, *optimizer.variables])


def check_what_is_refused():
    x, y = regression_data(BATCH)
    distributed = hvd.DistributedOptimizer(NLCG(0.1))
    expect(ValueError, "distributed already", hvd.DistributedOptimizer, distributed)
    expect(ValueError, "Keras 3 optimizer.*'adam'", hvd.DistributedOptimizer, "adam")
    expect(ValueError, "compression='zip'", hvd.DistributedOptimizer, NLCG(0.1), "zip")
    scaled = keras.optimizers.LossScaleOptimizer
    expect(ValueError, r"DistributedOptimizer\(keras.optimizers.LossScale", scaled, distributed)
    accumulating = scaled(NLCG(0.1, gradient_accumulation_steps=2))
    expect(ValueError, "gradient_accumulation_steps", hvd.DistributedOptimizer, accumulating)
    model = regression_model()
    model.compile(optimizer=distributed, loss="mse", jit_compile=True)
    expect(RuntimeError, "jit_compile=False", lambda: model.fit(x, y, verbose=0))


def check_a_model_that_is_not_built_cannot_be_broadcast():
    x, y = regression_data(BATCH)
    model = keras.Sequential([keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(NLCG(0.1))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    callbacks = [hvd.BroadcastVariables()]
    fit = lambda: model.fit(x, y, verbose=0, callbacks=callbacks)  # noqa: E731
    expect(ValueError, "keras.Input", fit)


def check_moving_statistics_are_averaged_by_the_callback():
    x, y = regression_data(BATCH)
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = hvd.DistributedOptimizer(NLCG(0.1))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    callbacks = [hvd.BroadcastVariables(), hvd.AverageMovingStatistics()]
    part = slice(hvd.rank() * BATCH // 2, (hvd.rank() + 1) * BATCH // 2)
    model.fit(x[part], y[part], verbose=0, validation_data=(x, y), callbacks=callbacks)
    hvd.check_identical([*model.variables, *optimizer.variables])


def check_bfloat16_variables():
    variable = keras.Variable([1.0, 2.0], dtype="bfloat16")
    optimizer = hvd.DistributedOptimizer(NLCG(0.1, line_search=None))
    optimizer.apply([tf.cast([float(hvd.rank()), 1.0], tf.bfloat16)], [variable])
    hvd.check_identical([variable, *optimizer.variables])
    assert optimizer.diagnostics()["updates"] == 1


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


def expect(kind, pattern, function, *arguments):
    import re

    try:
        function(*arguments)
    except kind as error:
        assert re.search(pattern, str(error), re.S), (pattern, str(error))
    else:
        raise AssertionError(f"{function} raised no {kind.__name__}")


if __name__ == "__main__":
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    assert hvd.size() == 2
    failed = False
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                print("passed", name, flush=True)
            except Exception:
                failed = True
                print("failed", name, flush=True)
                traceback.print_exc()
    sys.exit(failed)
