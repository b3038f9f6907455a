"""Every way of training a Keras model, each against the oracle fed with eager gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlcg_tf import NLCG
from tests.support.fitting import BATCH, UPDATES, fit, follow, weights_of
from tests.support.problems import (
    FollowGradients,
    paper_nlcg,
    regression_data,
    regression_model,
    relative_difference,
)

# The paper's two rules; and the default, with each preconditioner that it is for.
BLENDED = {"update_rule": "blended", "line_search": None, "nesterov": True}

FORMS = [
    {},
    {"update_rule": "polak_ribiere"},
    {**BLENDED, "preconditioner": "normalized_bfgs"},
    {**BLENDED, "preconditioner": None},
]

FORM_IDS = ["fletcher_reeves", "polak_ribiere", "blended_bfgs", "blended_none"]


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


@pytest.mark.parametrize("is_built", [True, False])
def test_a_loss_observed_eagerly_reaches_a_compiled_update(is_built):
    """The loss of each call counts, not the one that was there when the function was traced."""
    variable, optimizer = keras.Variable([1.0, 2.0]), paper_nlcg(0.1)
    if is_built:
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


class Wrapper(keras.optimizers.SGD):
    """One of a user's own around another optimizer, with a scale."""

    def __init__(self, inner):
        super().__init__()
        self.parts = {"inner": [inner]}

    def scale_loss(self, loss):
        return 4 * loss

    def apply(self, grads, trainable_variables=None):
        (inner,) = self.parts["inner"]
        inner.apply([g / 4 for g in grads], trainable_variables)


@pytest.mark.parametrize("wrapper", ["map", "function", "own"])
def test_an_optimizer_inside_of_another_is_told_the_loss(wrapper):
    """In `fit`, where nobody can call `observe_loss`."""
    x, y = regression_data()
    model, inner = regression_model(), paper_nlcg(0.05)
    oracle = follow(model, inner, x, y)
    if wrapper == "own":
        outer = Wrapper(inner)
    elif hasattr(keras.optimizers, "MultiOptimizer"):
        # By a function it finds the inner optimizer only when it is built.
        by_map, by_function = keras.optimizers.OptimizerMap(inner), lambda variable: inner
        chosen = by_map if wrapper == "map" else by_function
        outer = keras.optimizers.MultiOptimizer(chosen)
    else:
        pytest.skip("this Keras has no MultiOptimizer")
    fit(model, outer, x, y)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert inner.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)
    with pytest.raises(ValueError, match="has not seen the loss"):  # each served one update
        inner.apply([tf.zeros_like(v) for v in model.trainable_variables])


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
def test_mirrored_strategy_equals_one_replica(form, mirrored):
    x, y = regression_data()
    reference_model = regression_model()
    optimizer = paper_nlcg(0.05, **form, weight_decay=0.02)
    oracle = follow(reference_model, optimizer, x, y, weight_decay=0.02)
    with mirrored.scope():
        model = regression_model()
        optimizer = paper_nlcg(0.05, **form, weight_decay=0.02)
        model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, batch_size=BATCH, epochs=UPDATES * BATCH // len(x), shuffle=False, verbose=0)
    assert relative_difference(weights_of(model), oracle.w) < 1e-5
    assert optimizer.diagnostics()["learning_rate_scale"] == pytest.approx(oracle.scale)
    for variable in [*model.trainable_variables, *optimizer.slots["direction"]]:
        first, second = mirrored.experimental_local_results(variable.value)
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


@pytest.mark.parametrize("fused", ["auto", False])
@pytest.mark.parametrize("form", [{}, {"preconditioner": "spectral"}])
def test_gradients_whose_shape_a_trace_does_not_know(form, fused):
    """As those of an embedding are within the branch of a loss-scaling optimizer."""
    updates = []
    for signature in (None, [tf.TensorSpec(None)]):
        variable = keras.Variable([[1.0, 2.0], [3.0, 4.0]])
        optimizer = NLCG(0.1, fused=fused, **form)
        optimizer.build([variable])

        @tf.function(input_signature=signature)
        def apply(gradient):
            optimizer.observe_loss(1.0)  # noqa: B023
            optimizer.apply([gradient], [variable])  # noqa: B023

        apply(tf.constant([[0.1, 0.2], [0.3, 0.5]]))
        updates.append(variable.numpy())
    np.testing.assert_array_equal(*updates)
    with pytest.raises(tf.errors.InvalidArgumentError, match="shape"):
        apply(tf.ones(3))


def test_an_embedding_under_mixed_float16():
    tokens = np.random.default_rng(0).integers(0, 20, size=(64, 3))
    layers = [keras.layers.Embedding(20, 4), keras.layers.Flatten(), keras.layers.Dense(1)]
    for layer in layers:
        layer.dtype_policy = keras.DTypePolicy("mixed_float16")
    model = keras.Sequential([keras.Input((3,), dtype="int32"), *layers])
    optimizer = NLCG(0.02, preconditioner="spectral")
    model.compile(optimizer=keras.optimizers.LossScaleOptimizer(optimizer), loss="mse")
    losses = model.fit(tokens, tokens.mean(1), epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and optimizer.diagnostics()["skipped_updates"] == 0
