"""What two Horovod workers must agree on in updates; run by run_checks.py.

Each worker trains the reference by itself, on the whole batch with the plain optimizer, and then
its own part of the batch with the distributed one. One process runs all checks: starting workers
costs more than any of them.
"""

import copy

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from nlcg_tf.fused import nlcg_update
from nlcg_tf.horovod.whole import first_state
from tests.distributed.training import BATCH, RULES, UPDATES, expect, make, shard_of, trained
from tests.support.problems import (
    digits_data,
    digits_model,
    flat,
    paper_nlcg,
    regression_data,
    regression_model,
    relative_difference,
)
from trainers.engine.plan import make_plan
from trainers.engine.trainer import Trainer


def check_virtual_batch_equals_real_batch():
    """One process or two, whole batches or micro-batches: the same updates."""
    cases = {"float32": (2e-5, ["blended"]), "float64": (1e-11, [*RULES, "rmsprop"])}
    for dtype, (bound, names) in cases.items():
        keras.config.set_floatx(dtype)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        data = digits_data(BATCH, dtype)
        for name in names:
            # Keras' own optimizers average the weights on each micro-step, if not distributed.
            ema = name == "fletcher_reeves"
            arguments = {"global_clipnorm": 0.5, "weight_decay": 0.01, "use_ema": ema}

            def run(
                processes, steps, loss=loss, name=name, arguments=arguments, dtype=dtype, data=data
            ):
                accumulation = steps if steps > 1 else None
                optimizer = make(name, gradient_accumulation_steps=accumulation, **arguments)
                if processes == 2:
                    optimizer = hvd.DistributedOptimizer(optimizer)
                model = trained(optimizer, digits_model(dtype), loss, *data, steps)
                state = list(model.trainable_variables)
                if name in RULES:
                    state += [v for slot in optimizer.slots.values() for v in slot]
                    state.append(optimizer.reals)
                return model, optimizer, [flat([v]) for v in state]

            _, _, expected = run(1, 1)
            # One process: test_fit.py. The blended rule stands for all without accumulation.
            for processes, steps in ((2, 1), (2, 2)) if name == "blended" else ((2, 2),):
                model, optimizer, actual = run(processes, steps)
                weights = len(model.trainable_variables)
                difference = relative_difference(flat(actual[:weights]), flat(expected[:weights]))
                assert difference < bound, (dtype, name, processes, steps, difference)
                if name in RULES:  # slots and line search
                    rest = relative_difference(flat(actual[weights:]), flat(expected[weights:]))
                    assert rest < bound, (dtype, name, processes, steps, rest)
                if processes == 2:
                    hvd.check_identical([*model.variables, *optimizer.variables])
    keras.config.set_floatx("float32")


def check_custom_loop_eager_and_graph():
    x, y = regression_data(BATCH)
    plain = make("fletcher_reeves")
    expected = flat(trained(plain, regression_model(units=64), "mse", x, y).get_weights())
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
            step(shard_of(x), shard_of(y))
        difference = relative_difference(flat(model.get_weights()), expected)
        assert difference < 2e-5, (graph, difference)


def check_workers_share_the_polar_factors():
    """Each computes some, and all have the bits of one worker's up to rounding."""
    shapes = [(3, 3, 2, 8), (18, 8), (6, 40), (40, 6), (7,), (1, 5)]
    ends = []
    for processes in (1, 2):
        rng = np.random.default_rng(0)
        variables = [keras.Variable(rng.normal(size=shape), dtype="float32") for shape in shapes]
        optimizer = NLCG(0.05, "momentum", "spectral")
        if processes == 2:
            optimizer = hvd.DistributedOptimizer(optimizer)
        optimizer.build(variables)
        step = tf.function(lambda gradients, o=optimizer: o.apply(gradients))
        for _ in range(10):
            # On two workers the mean of 1.5 g and 0.5 g.
            share = 1.5 - hvd.rank() if processes == 2 else 1.0
            step([tf.constant(share * rng.normal(size=s), tf.float32) for s in shapes])
        ends.append(flat(variables))
        if processes == 2:
            hvd.check_identical([*variables, *optimizer.variables])
    assert relative_difference(*ends) < 1e-6
    graph = step.get_concrete_function([tf.zeros(s) for s in shapes]).graph
    # Two groups of equal shapes and three other kernels: no worker has all.
    products = [op for op in graph.get_operations() if op.type == "BatchMatMulV2"]
    counts = hvd.allgather_object(len(products))
    assert all(0 < count < 5 * 18 for count in counts), counts


def check_traffic():
    """One round for an update, of the gradients' bytes and at most 64 more; none in micro-steps."""
    layers = [keras.layers.Flatten(), *digits_model().layers]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    trainer = Trainer(model, NLCG(0.1), hvd)
    trainer.divide(make_plan(1000, 64, 8, 2, 1))
    image = tf.TensorSpec((8, 8, 8, 1), tf.float32), tf.TensorSpec((8,), tf.int32)

    def sent(function, *arguments):
        graph = function.get_concrete_function(*arguments).graph
        operations = [op for op in graph.get_operations() if op.type.startswith("Horovod")]
        return [sum(x.shape.num_elements() * x.dtype.size for x in op.inputs) for op in operations]

    gradients = sum(4 * v.shape.num_elements() for v in model.trainable_variables)
    assert sent(trainer.micro_step, *image) == []
    (round_,) = sent(trainer.apply, tf.TensorSpec(()))
    assert gradients < round_ <= gradients + 64, (round_, gradients)


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
    frozen = keras.Sequential(
        [keras.Input((2,)), model, keras.layers.Dense(1), keras.layers.BatchNormalization()]
    )
    for layer in frozen.layers[1:]:
        layer.trainable = False
    mean.assign([float(hvd.rank()), 0.1])
    others = [v for layer in frozen.layers[1:] for v in layer.variables]
    for variable in others:
        variable.assign(keras.ops.full(variable.shape, hvd.rank() + 1.0))
    hvd.average_moving_statistics(frozen)
    np.testing.assert_array_equal(mean.numpy(), np.float32([0.5, 0.1]))
    assert all((v.numpy() == hvd.rank() + 1.0).all() for v in others)


def check_the_watch_ends_at_once():
    """Not after its next beat, which is in 100 minutes."""
    with hvd.Watch(seconds=36_000):
        pass


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


class OwnApply(keras.optimizers.SGD):
    """Uses the gradients at once, and Keras' `apply` for nothing but its counts."""

    def apply(self, grads, trainable_variables=None):
        for variable, gradient in zip(trainable_variables, grads):
            variable.assign_sub(gradient)
        super().apply([0 * g for g in grads], trainable_variables)


class OwnBackend(keras.optimizers.SGD):
    def _backend_apply_gradients(self, grads, trainable_variables):
        for variable, gradient in zip(trainable_variables, grads):
            variable.assign_sub(gradient)


class OwnApplyGradients(keras.optimizers.SGD):
    def apply_gradients(self, grads_and_vars):
        for gradient, variable in grads_and_vars:
            variable.assign_sub(gradient)


def check_an_optimizer_of_any_class_averages_or_is_refused():
    own = tf.constant([1.0 + hvd.rank()])  # 1.5 in the mean
    nested = keras.optimizers.SGD(1.0)
    if hasattr(keras.optimizers, "MultiOptimizer"):
        nested = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(nested))
    for plain in (OwnApply(1.0), keras.optimizers.LossScaleOptimizer(nested, 1.0)):
        variable = keras.Variable([1.0])
        optimizer = hvd.DistributedOptimizer(plain)
        optimizer.build([variable])
        apply = lambda: optimizer.apply([own], [variable])  # noqa: E731, B023
        apply()
        tf.function(apply)()
        assert variable.numpy() == [-2.0], (plain, variable.numpy())
    variable = keras.Variable([1.0], name="v")
    backend = hvd.DistributedOptimizer(OwnBackend())
    backend.build([variable])
    apply = lambda: backend.apply([own], [variable])  # noqa: E731
    expect(RuntimeError, "`apply` of DistributedOwnBackend.*without the average", apply)
    expect(RuntimeError, "without the average", tf.function(apply))
    gradients = hvd.DistributedOptimizer(OwnApplyGradients())
    apply = lambda: gradients.apply_gradients([(own, variable)])  # noqa: E731
    expect(RuntimeError, "`apply_gradients` of DistributedOwnApplyGradients", apply)
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=2))
    for _ in range(4):
        sgd.apply([own], [variable])
    variable.overwrite_with_gradient = True
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD())
    expect(ValueError, "'v' is overwritten with its gradient", sgd.apply, [own], [variable])
    expect(TypeError, "copy of a distributed", copy.deepcopy, sgd)


def check_the_loss_of_an_optimizer_deep_inside_is_averaged():
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        return
    for chosen in (keras.optimizers.OptimizerMap, lambda inner: lambda variable: inner):
        inner = paper_nlcg(0.1, "blended", "normalized_bfgs")
        outer = keras.optimizers.MultiOptimizer(chosen(inner))
        optimizer = hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(outer, 1.0))
        variable = keras.Variable([1.0, 2.0])
        for t in range(6):
            optimizer.scale_loss(tf.constant(1.0 + hvd.rank() + t % 3))
            optimizer.apply([variable * (1.0 + hvd.rank())], [variable])
        kept = [v for v in inner.variables if v is not inner.observed_loss]
        hvd.check_identical([variable, *kept])


def check_a_wrapper_ends_with_the_averages_of_the_weights():
    """Where an optimizer inside of it keeps them."""
    sgd = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(sgd, 1.0))
    variable = keras.Variable([1.0])
    for _ in range(2):
        optimizer.apply([tf.constant([1.0 + hvd.rank()])], [variable])  # 1.5 in the mean
    optimizer.finalize_variable_values([variable])
    np.testing.assert_allclose(variable.numpy(), [-1.25])  # of -0.5 and -2


def check_variables_of_tensorflow_are_updated():
    for shard in (False, True):
        variable = tf.Variable([1.0, 2.0])
        optimizer = hvd.DistributedOptimizer(NLCG(0.1, "momentum"), shard=shard)
        optimizer.build([variable])
        optimizer.apply([tf.constant([1.0, 1.0]) + hvd.rank()], [variable])
        np.testing.assert_allclose(variable.numpy(), [0.715, 1.715], rtol=1e-6)
        if shard:  # as elastic workers do
            optimizer.divide_anew(first_state(optimizer))
            np.testing.assert_array_equal(optimizer.slots["direction"][0].numpy(), [0.0])


def check_the_workers_may_have_made_other_optimizers_before():
    """Keras counts them up in their names, and a graph has the names of Horovod's operations."""
    for _ in range(hvd.rank()):
        keras.optimizers.SGD()
    variable = keras.Variable([1.0])
    sgd = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    sgd.build([variable])
    step = tf.function(lambda x: sgd.apply([x], [variable]))
    for _ in range(4):
        step(tf.constant([1.0 + hvd.rank()]))
    np.testing.assert_allclose(variable.numpy(), [0.7], rtol=1e-6)


def check_settings_that_differ_are_refused():
    variable, gradient = keras.Variable([1.0], name="v"), tf.constant([1.0])
    other = hvd.rank() == 1

    def apply(optimizer, gradient=gradient, **arguments):
        hvd.DistributedOptimizer(optimizer, **arguments).apply([gradient], [variable])

    sgd, adam = keras.optimizers.SGD, keras.optimizers.Adam
    refused = lambda words, *args, **more: expect(ValueError, words, apply, *args, **more)  # noqa: E731
    refused("`class`.*SGD.*Adam", (adam if other else sgd)(0.1))
    refused("`compression`", sgd(), compression="bf16" if other else None)
    refused("`shard`", sgd(), shard=other)
    refused("`learning_rate`: 0.1.* on worker 0, 0.2.* on worker 1", sgd(0.2 if other else 0.1))
    optimizer = hvd.DistributedOptimizer(sgd(0.1, 0.9 if other else 0.5))
    optimizer.build([variable])
    in_graph = tf.function(lambda: optimizer.apply([gradient], [variable]))
    expect(ValueError, "`momentum`: 0.5 on worker 0", in_graph)
    shape = "float32 \\(1,\\).*float32 \\(2,\\)|float32 \\(2,\\)"
    refused(shape, sgd(), tf.ones([1 + hvd.rank()]))
    optimizer = hvd.DistributedOptimizer(sgd())
    variables = [keras.Variable([1.0], name=name) for name in ("a", "b")]
    optimizer.apply([gradient, gradient], variables)
    later = [gradient, None if other else gradient]
    expect(ValueError, "'b' has .*worker 0 and none on worker 1", optimizer.apply, later, variables)


def check_a_fused_op_that_one_worker_lacks_is_an_error_on_all():
    """Built or not before the first update, and inside of a loss scale; if one would use it."""
    library = nlcg_update.LIBRARY
    scaled = keras.optimizers.LossScaleOptimizer
    forms = [(NLCG(0.1, "momentum"), is_built, True) for is_built in (True, False)]
    forms += [(scaled(NLCG(0.1, "momentum")), is_built, True) for is_built in (True, False)]
    forms.append((NLCG(0.1, "polak_ribiere", "spectral"), False, False))
    for optimizer, is_built, is_error in forms:
        variable, optimizer = keras.Variable([1.0]), hvd.DistributedOptimizer(optimizer)
        if is_built:
            optimizer.build([variable])
        try:
            if hvd.rank() == 1:
                nlcg_update.LIBRARY = library.with_name("nothing.so")
                nlcg_update._load.cache_clear()
            if is_error:
                words = "fused.*the fused op. on worker 0, .the reference update. on worker 1"
                expect(ValueError, words, optimizer.apply, [tf.ones(1)], [variable])
            else:
                optimizer.apply([tf.ones(1)], [variable])
        finally:
            nlcg_update.LIBRARY = library
            nlcg_update._load.cache_clear()
