"""Every way of training a Keras model, each against the oracle fed with eager gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import (
    FollowGradients,
    flat,
    paper_nlcg,
    regression_data,
    regression_model,
    relative_difference,
)

from nlcg_tf import NLCG

BATCH, UPDATES = 16, 8
# The paper's two rules; and the default, with each preconditioner that it is for.
BLENDED = {"update_rule": "blended", "line_search": None, "nesterov": True}
FORMS = [
    {},
    {"update_rule": "polak_ribiere"},
    {**BLENDED, "preconditioner": "normalized_bfgs"},
    {**BLENDED, "preconditioner": "rms"},
]
FORM_IDS = ["fletcher_reeves", "polak_ribiere", "blended_bfgs", "blended_rms"]


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


@pytest.mark.parametrize(
    "compile_arguments",
    [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 4}],
    ids=lambda arguments: next(iter(arguments), "default"),
)
@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_fit(compile_arguments, form):
    x, y = regression_data()
    model, optimizer = regression_model(), paper_nlcg(0.05, **form)
    oracle = follow(model, optimizer, x, y)
    fit(model, optimizer, x, y, **compile_arguments)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert optimizer.diagnostics()["updates"] == UPDATES
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)


@pytest.mark.parametrize("form", [{}, {"line_search": "step"}, FORMS[2]], ids=str)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_virtual_batch_equals_the_real_batch(form, jit_compile):
    """Accumulation, line search, schedule and weight decay: k micro-batches are one batch."""
    x, y = regression_data()
    schedule = keras.optimizers.schedules.PolynomialDecay(0.05, UPDATES, 0.01)
    optimizer = paper_nlcg(schedule, **form, gradient_accumulation_steps=4, weight_decay=0.02)
    model = regression_model()
    rates = [float(schedule(t)) for t in range(UPDATES)]
    oracle = follow(model, optimizer, x, y, rates=rates, weight_decay=0.02)
    fit(model, optimizer, x, y, BATCH // 4, 4 * UPDATES, jit_compile=jit_compile)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert optimizer.diagnostics()["updates"] == UPDATES
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)


@pytest.mark.parametrize("graph", [True, False])
def test_custom_loop_with_observe_loss(graph):
    x, y = regression_data()
    model, optimizer = regression_model(), paper_nlcg(0.05)
    oracle = follow(model, optimizer, x, y)
    optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        optimizer.observe_loss(loss)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    step = tf.function(step) if graph else step
    for t in range(UPDATES):
        rows = np.arange(t * BATCH, (t + 1) * BATCH) % len(x)
        step(x[rows], y[rows])
    assert relative_difference(weights_of(model), oracle.w) < 1e-5


def test_a_loss_observed_eagerly_reaches_a_compiled_update():
    """The loss of each call counts, not the one that was there when the function was traced."""
    variable, optimizer = keras.Variable([1.0, 2.0]), paper_nlcg(0.1)
    optimizer.build([variable])
    apply = tf.function(lambda gradient: optimizer.apply([gradient], [variable]))
    for loss in (1.0, 2.0, 3.0):
        optimizer.observe_loss(loss)
        apply(tf.constant([0.1, 0.1]))
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(0.975**2)


def test_a_loss_observed_in_a_graph_reaches_an_eager_update():
    variable, optimizer = keras.Variable([1.0, 2.0]), paper_nlcg(0.1)
    observe = tf.function(lambda loss: optimizer.observe_loss(loss))
    for loss in (1.0, 2.0, 3.0):
        observe(tf.constant(loss))
        optimizer.apply([tf.constant([0.1, 0.1])], [variable])
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(0.975**2)


def test_a_missing_loss_is_an_error_that_shows_the_way_out():
    variable, optimizer = keras.Variable([1.0]), paper_nlcg(0.1)
    with pytest.raises(ValueError, match=r"observe_loss[^$]*line_search=None"):
        optimizer.apply([tf.constant([1.0])], [variable])
    optimizer.observe_loss(1.0)
    optimizer.apply([tf.constant([1.0])], [variable])
    with pytest.raises(ValueError, match="observe_loss"):
        optimizer.apply([tf.constant([1.0])], [variable])
    assert optimizer.diagnostics()["updates"] == 1


def test_float64_variables():
    keras.config.set_floatx("float64")
    x, y = regression_data(dtype="float64")
    model, optimizer = regression_model(dtype="float64"), paper_nlcg(0.05, "polak_ribiere")
    reference = FollowGradients(model, optimizer)
    for t in range(UPDATES):
        rows = np.arange(t * BATCH, (t + 1) * BATCH) % len(x)
        reference.update(x[rows], y[rows], 0.05)
    fit(model, optimizer, x, y)
    assert relative_difference(weights_of(model), reference.oracle.w) < 1e-12


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_mixed_precision(policy, jit_compile):
    """Variables stay float32; gradients carry the rounding of the half-precision layers."""
    keras.config.set_dtype_policy(policy)
    x, y = regression_data()
    model, optimizer = regression_model(), paper_nlcg(0.05)
    start = weights_of(model)
    oracle = follow(model, optimizer, x.astype("float32"), y)
    fit(model, optimizer, x, y, jit_compile=jit_compile)
    wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert wrapped == (policy == "mixed_float16")
    assert relative_difference(weights_of(model) - start, oracle.w - start) < 0.03
    assert optimizer.diagnostics()["updates"] == UPDATES
    observed = optimizer.reals.numpy()[optimizer.real_names.index("previous_loss")]
    assert observed == pytest.approx(oracle.previous_loss, rel=0.02)


def test_loss_scaling_halves_and_skips_without_touching_nlcg():
    """An overflow under LossScaleOptimizer leaves NLCG's state as it was, then training goes on."""
    variable = keras.Variable([1.0, 2.0])
    inner = paper_nlcg(0.1)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer.build([variable])
    for gradient in ([8.0, 8.0], [np.inf, 8.0], [8.0, 8.0]):
        optimizer.scale_loss(tf.constant(1.0))
        optimizer.apply([tf.constant(gradient)], [variable])
    assert inner.diagnostics()["updates"] == 2
    assert inner.diagnostics()["skipped_updates"] == 0


@pytest.mark.parametrize("dropped", [100.0, np.nan])
def test_a_micro_step_that_overflows_has_no_part_in_the_mean_loss(dropped):
    variable, inner = keras.Variable([1.0, 2.0]), paper_nlcg(0.1, gradient_accumulation_steps=2)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer.build([variable])
    for loss, element in ((1.0, 8.0), (dropped, np.inf), (3.0, 8.0)):
        optimizer.scale_loss(tf.constant(loss))
        optimizer.apply([tf.constant([element, 8.0])], [variable])
    assert inner.diagnostics()["updates"] == 1
    assert inner.reals.numpy()[inner.real_names.index("previous_loss")] == 2.0


def test_of_a_loss_that_is_told_twice_the_second_counts():
    variable, optimizer = keras.Variable([1.0]), paper_nlcg(0.1, gradient_accumulation_steps=2)
    for loss in (0.0, 2.0):
        optimizer.observe_loss(loss)
        optimizer.scale_loss(tf.constant(loss))
        optimizer.apply([tf.constant([1.0])], [variable])
    assert optimizer.reals.numpy()[optimizer.real_names.index("previous_loss")] == 1.0


def test_a_loss_serves_one_update(fused_library):
    """After training in a graph too."""
    variable, optimizer = keras.Variable([1.0]), paper_nlcg(0.1)
    optimizer.build([variable])

    @tf.function
    def step(loss):
        optimizer.observe_loss(loss)
        optimizer.apply([tf.ones(1)], [variable])

    step(tf.constant(1.0))
    before = variable.numpy()
    with pytest.raises(ValueError, match="has not seen the loss"):
        optimizer.apply([tf.ones(1)], [variable])
    assert variable.numpy() == before


@pytest.mark.parametrize("form", FORMS[1:3], ids=FORM_IDS[1:3])
def test_mirrored_strategy_equals_one_replica(form):
    x, y = regression_data()
    reference_model = regression_model()
    optimizer = paper_nlcg(0.05, **form, weight_decay=0.02)
    oracle = follow(reference_model, optimizer, x, y, weight_decay=0.02)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = regression_model()
        optimizer = paper_nlcg(0.05, **form, weight_decay=0.02)
        model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, batch_size=BATCH, epochs=UPDATES * BATCH // len(x), shuffle=False, verbose=0)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)
    for variable in [*model.trainable_variables, *optimizer.slots["direction"]]:
        first, second = strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize("steps", [None, 2])
def test_embeddings_with_sparse_gradients(steps):
    tokens = np.random.default_rng(0).integers(0, 20, size=(64, 3))
    y = tokens.sum(axis=1, keepdims=True).astype("float32") / 30
    layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    optimizer = paper_nlcg(0.05, gradient_accumulation_steps=steps)
    oracle = follow(model, optimizer, tokens, y)
    parts = steps or 1
    fit(model, optimizer, tokens, y, BATCH // parts, UPDATES * parts)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5


def test_frozen_layers_and_variables_without_a_gradient():
    """Frozen weights stay; a variable without a gradient stays and is left out of all sums."""
    x, y = regression_data()
    model, optimizer = regression_model(), paper_nlcg(0.05)
    model.layers[0].trainable = False
    frozen = model.layers[0].get_weights()
    oracle = follow(model, optimizer, x, y)
    fit(model, optimizer, x, y)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    for before, after in zip(frozen, model.layers[0].get_weights()):
        np.testing.assert_array_equal(before, after)

    used, unused = keras.Variable([1.0, 2.0]), keras.Variable([3.0])
    alone = keras.Variable([1.0, 2.0])
    both, single = paper_nlcg(0.1, line_search=None), paper_nlcg(0.1, line_search=None)
    for gradient in ([0.5, 0.1], [0.4, -0.2], [0.3, 0.3]):
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            both.apply([tf.constant(gradient), None], [used, unused])
        single.apply([tf.constant(gradient)], [alone])
    np.testing.assert_array_equal(used.numpy(), alone.numpy())
    np.testing.assert_array_equal(unused.numpy(), [3.0])


def clip_by_norm(norm):
    def clip(g, sizes=(24, 6, 6, 1)):
        parts = np.split(g, np.cumsum(sizes)[:-1])
        return np.concatenate([p * min(1, norm / np.linalg.norm(p)) for p in parts])

    return clip


@pytest.mark.parametrize(
    "arguments, transform",
    [
        ({"clipvalue": 0.05}, lambda g: np.clip(g, -0.05, 0.05)),
        ({"clipnorm": 0.1}, clip_by_norm(0.1)),
        ({"global_clipnorm": 0.2}, lambda g: g * min(1, 0.2 / np.linalg.norm(g))),
        ({"loss_scale_factor": 128.0}, lambda g: g),
    ],
    ids=["clipvalue", "clipnorm", "global_clipnorm", "loss_scale_factor"],
)
@pytest.mark.parametrize("steps", [None, 4])
def test_clipping_and_static_loss_scaling(arguments, transform, steps):
    """Clipping acts on the gradient of the virtual batch, the line search on the unscaled loss."""
    x, y = regression_data()
    model = regression_model()
    optimizer = paper_nlcg(0.05, gradient_accumulation_steps=steps, **arguments)
    oracle = follow(model, optimizer, x, y, transform=transform)
    parts = steps or 1
    fit(model, optimizer, x, y, BATCH // parts, UPDATES * parts)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)


def test_weight_decay_leaves_out_what_is_excluded():
    x, y = regression_data()
    model, optimizer = regression_model(), paper_nlcg(0.05, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    decayed = np.concatenate(
        [np.full(v.numpy().size, "kernel" in v.path) for v in model.trainable_variables]
    )
    oracle = follow(model, optimizer, x, y, weight_decay=0.1 * decayed)
    fit(model, optimizer, x, y)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("overwrite", [None, 3])
def test_ema_advances_once_an_update(steps, overwrite):
    x, y = regression_data()
    optimizer = paper_nlcg(
        0.05,
        use_ema=True,
        ema_momentum=0.8,
        ema_overwrite_frequency=overwrite,
        gradient_accumulation_steps=steps,
    )
    model = regression_model()
    reference, average = FollowGradients(model, optimizer), 0.0
    for t in range(UPDATES):
        rows = np.arange(t * BATCH, (t + 1) * BATCH) % len(x)
        reference.update(x[rows], y[rows], float(np.float32(0.05)))
        momentum = 0.8 if t else 0.0
        average = momentum * average + (1 - momentum) * reference.oracle.w
        if overwrite and (t + 1) % overwrite == 0:
            reference.oracle.w = average.copy()
    parts = steps or 1
    fit(model, optimizer, x, y, BATCH // parts, UPDATES * parts)
    # At the end of `fit` the model holds the average.
    assert relative_difference(weights_of(model), average) < 1e-5


def test_constraints():
    x, y = regression_data()
    constraint = keras.constraints.MaxNorm(0.7, axis=0)
    model, optimizer = regression_model(kernel_constraint=constraint), paper_nlcg(0.2)
    reference = FollowGradients(model, optimizer)
    for t in range(UPDATES):
        rows = np.arange(t * BATCH, (t + 1) * BATCH) % len(x)
        reference.update(x[rows], y[rows], float(np.float32(0.2)))
        kernel = reference.oracle.w[:24].reshape(4, 6)
        norms = np.linalg.norm(kernel, axis=0)
        reference.oracle.w[:24] = (kernel * np.minimum(norms, 0.7) / (1e-7 + norms)).ravel()
    fit(model, optimizer, x, y)
    assert relative_difference(weights_of(model), reference.oracle.w) < 1e-5
    assert np.linalg.norm(model.layers[0].get_weights()[0], axis=0).max() < 0.7001


def test_fit_traces_the_update_no_more_than_keras_own_optimizers():
    x, y = regression_data()

    def traces_of(base, **arguments):
        traces = []

        class Counting(base):
            def _backend_update_step(self, *arguments):
                traces.append(1)
                super()._backend_update_step(*arguments)

        model = regression_model()
        fit(model, Counting(0.05, **arguments), x, y, updates=4)
        first = len(traces)
        model.fit(x, y, batch_size=BATCH, epochs=3, verbose=0)
        return first, len(traces)

    first, last = traces_of(NLCG)
    assert (first, last) == traces_of(keras.optimizers.Adam)
    assert first == last


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_variables_are_computed_in_float32(dtype):
    """epsilon = 1e-8 and the squares of small gradients vanish in half precision."""
    variable = keras.Variable([1.0, 2.0], dtype=dtype)
    optimizer = paper_nlcg(0.1, line_search=None, preconditioner=None)
    for _ in range(3):
        optimizer.apply([tf.cast([1e-3, 2e-3], dtype)], [variable])
    assert optimizer.diagnostics()["beta"] == pytest.approx(1.0, rel=0.01)
    assert optimizer.diagnostics()["cosine"] == pytest.approx(1.0)
