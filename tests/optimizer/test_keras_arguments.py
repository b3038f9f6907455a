"""The arguments that every Keras optimizer has."""

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
    optimizer.exclude_from_weight_decay(var_names=["/bias"])  # the layer's name is before it
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


@pytest.mark.parametrize("why", ["no update yet", "all skipped", "all overflow"])
def test_ema_without_an_update_leaves_the_weights(why):
    x, y = regression_data(64)
    optimizer = paper_nlcg(0.05, use_ema=True, gradient_accumulation_steps=8)
    if why != "no update yet":
        x, optimizer = x * np.nan, paper_nlcg(0.05, use_ema=True)
    if why == "all overflow":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = regression_model()
    before = weights_of(model)
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(x, y, batch_size=16, verbose=0)
    np.testing.assert_array_equal(weights_of(model), before)


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
