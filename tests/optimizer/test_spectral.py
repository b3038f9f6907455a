"""The spectral preconditioner, against singular value decompositions in float64."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import nlcg_tf
from nlcg_tf import NLCG
from tests.support.fitting import BATCH, UPDATES, weights_of
from tests.support.oracle import Oracle
from tests.support.problems import (
    SHAPES,
    MeanSquares,
    flat,
    regression_data,
    regression_model,
    relative_difference,
)

KERNELS = [(3, 3, 2, 8), (6, 10), (40, 5), (1, 7), (5,), ()]


def spectral(g, w):
    """P g of a variable, from the definition."""
    if g.ndim < 2:
        return 0.3 * g / np.sqrt(np.mean(g**2))
    u, _, v = np.linalg.svd(g.reshape(-1, g.shape[-1]), full_matrices=False)
    factor = u @ v
    length = max(np.linalg.norm(w), 0.01 * np.sqrt(g.shape[-1]))
    return (length / np.linalg.norm(factor) * factor).reshape(g.shape)


def limited(before, after):
    """The weights of a variable after a step."""
    norm = np.linalg.norm(after)
    longest = max(np.linalg.norm(before), np.sqrt(before.shape[-1])) if before.ndim > 1 else norm
    return after * (longest / norm) if norm > longest else after


def of_vectors(function, shapes):
    """A function of two arrays for all variables end to end, for the oracle."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

    def apply(g, w):
        parts = zip(np.split(g, ends), np.split(w, ends), shapes)
        return flat(function(a.reshape(shape), b.reshape(shape)) for a, b, shape in parts)

    return apply


def draw(rng, shapes=KERNELS, size=1.0):
    return [np.asarray(size * rng.normal(size=shape), "float32") for shape in shapes]


def make_optimizer(**arguments):
    return NLCG(
        **{"learning_rate": 0.05, "update_rule": "momentum", "preconditioner": "spectral"},
        **arguments,
    )


def step_once(optimizer, weights, gradients):
    variables = [keras.Variable(w) for w in weights]
    optimizer.apply([tf.constant(g) for g in gradients], variables)
    return [v.numpy() for v in variables]


@pytest.mark.parametrize("nesterov, line_search", [(True, None), (False, "online")])
@pytest.mark.parametrize(
    "rule, fused",
    [
        *itertools.product(["momentum", "fletcher_reeves"], [False, True]),
        *itertools.product(["polak_ribiere", "blended"], [False]),  # which the op does not have
    ],
    indirect=["fused"],
)
def test_updates_are_those_of_the_oracle(rule, nesterov, line_search, fused):
    """To a thousandth, for the polar factors are no nearer to those of an exact decomposition."""
    rng = np.random.default_rng(0)
    shapes = [shape for shape in [*SHAPES, *KERNELS] if np.prod(shape) < 500]
    start = [rng.normal(size=shape) for shape in shapes]
    variables = [keras.Variable(w, dtype="float64") for w in start]
    arguments = {"nesterov": nesterov, "line_search": line_search, "fused": fused}
    optimizer = NLCG(0.02, rule, "spectral", **arguments)
    given, limit = of_vectors(spectral, shapes), of_vectors(limited, shapes)
    oracle = Oracle(flat(start), [], rule, given, line_search, nesterov=nesterov, limit=limit)
    for t in range(10):
        gradients = [v.numpy() + 0.1 * rng.normal(size=v.shape) for v in variables]
        loss = float(np.float32(1 / (1 + t)))
        optimizer.observe_loss(loss)
        optimizer.apply([tf.constant(g) for g in gradients], variables)
        oracle.update(flat(gradients), loss, 0.02)
    difference = flat(v.numpy() for v in variables) - flat(start)
    assert relative_difference(difference, oracle.w - flat(start)) < 3e-3
    diagnostics = optimizer.diagnostics()
    assert diagnostics["beta"] == pytest.approx(oracle.beta, rel=1e-2)
    assert diagnostics["cosine"] == pytest.approx(oracle.cosine, rel=1e-2)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_first_update_moves_a_kernel_by_the_rate_times_its_norm(nesterov, rng, fused):
    weights = draw(rng)
    gradients = draw(rng, size=1e-3)
    optimizer = make_optimizer(nesterov=nesterov, fused=fused)
    for before, after, g in zip(weights, step_once(optimizer, weights, gradients), gradients):
        # beta is that of the look-ahead: the direction before is zero, the coming one is not.
        step = -0.05 * (1 + 0.9 * nesterov) * spectral(g, before)
        expected = limited(before, before + step) - before
        np.testing.assert_allclose(after - before, expected, atol=2e-3 * np.abs(expected).max())


def test_kernels_of_zeros_move_and_gradients_of_zeros_do_nothing(fused):
    weights = [np.zeros((4, 3), "float32"), np.ones((4, 3), "float32"), np.ones(3, "float32")]
    gradients = [np.ones((4, 3), "float32"), np.zeros((4, 3), "float32"), np.zeros(3, "float32")]
    moved, *others = step_once(make_optimizer(fused=fused), weights, gradients)
    assert (moved < 0).all()
    for before, after in zip(weights[1:], others):
        np.testing.assert_array_equal(after, before)


def test_kernels_grow_to_the_size_of_initializers_and_then_keep_their_norms(fused):
    """Small ones, such as those of zeros, have columns of unit length at the end."""
    rng = np.random.default_rng(0)
    starts = [np.zeros((6, 4), "float32"), 5 * rng.normal(size=(6, 4)).astype("float32")]
    variables = [keras.Variable(w) for w in [*starts, np.zeros(4, "float32")]]
    optimizer = make_optimizer(fused=fused)
    gradient = rng.normal(size=(6, 4)).astype("float32")
    optimizer.build(variables)
    update = tf.function(lambda: optimizer.apply([gradient, gradient, np.ones(4, "f")], variables))
    for _ in range(200):
        update()
    norms = [np.linalg.norm(v.numpy()) for v in variables]
    np.testing.assert_allclose(norms[:2], [2.0, np.linalg.norm(starts[1])], rtol=1e-5)
    assert norms[2] > 10  # vectors have no limit


def test_without_the_limit_kernels_grow(fused):
    free = nlcg_tf.preconditioner.Spectral(limits_norms=False)
    optimizer = NLCG(0.1, preconditioner=free, fused=fused)
    variable = keras.Variable(np.eye(4, dtype="float32"))
    for _ in range(5):
        optimizer.apply([-tf.eye(4)], [variable])
    # Each step is 0.1 of a length that grows with the weights, times that of summed directions.
    assert np.linalg.norm(variable.numpy()) > 2 * (1 + 5 * 0.1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad, rng, fused):
    weights = draw(rng)
    gradients = draw(rng)
    gradients[1][2, 3] = bad
    optimizer = make_optimizer(fused=fused)
    for before, after in zip(weights, step_once(optimizer, weights, gradients)):
        np.testing.assert_array_equal(after, before)
    assert optimizer.diagnostics()["skipped_updates"] == 1
    assert not any(np.any(v) for v in optimizer.slots["direction"])


def test_its_rule_is_momentum_unless_another_is_asked_for():
    assert NLCG(preconditioner="spectral").update_rule == "momentum"
    assert NLCG(preconditioner="spectral", update_rule="blended").update_rule == "blended"
    assert NLCG().update_rule == "blended"


@pytest.mark.parametrize("rule", ["momentum", "fletcher_reeves"])
def test_the_state_is_four_bytes_a_parameter(rule):
    optimizer = NLCG(0.05, rule, "spectral")
    optimizer.build([keras.Variable(np.zeros((100, 10), "float32"))])
    assert sum(np.prod(v.shape) >= 100 for v in optimizer.variables) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_variables_are_computed_in_float32(dtype, rng):
    weight, gradient = (rng.normal(size=(40, 5)).astype("float32") for _ in range(2))
    variable = keras.Variable(weight, dtype=dtype)
    make_optimizer().apply([tf.cast(gradient, dtype)], [variable])
    expected = limited(weight, weight - 0.05 * 1.9 * spectral(gradient, weight))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), expected, atol=2e-2
    )


def fit(strategy=None, steps=None, **compile_arguments):
    """The weights after 8 updates of 16 examples."""
    x, y = regression_data()
    fused = compile_arguments.pop("fused", "auto")
    with (strategy or tf.distribute.get_strategy()).scope():
        model = regression_model()
        optimizer = make_optimizer(gradient_accumulation_steps=steps, fused=fused)
        model.compile(optimizer=optimizer, loss="mse", **compile_arguments)
    batch = BATCH // (steps or 1)
    model.fit(x, y, batch_size=batch, epochs=UPDATES * BATCH // len(x), shuffle=False, verbose=0)
    assert optimizer.diagnostics()["updates"] == UPDATES
    return weights_of(model)


@pytest.fixture(scope="module")
def expected():
    return fit(jit_compile=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"jit_compile": True},
        {"run_eagerly": True},
        {"jit_compile": False, "fused": False},
        {"jit_compile": False, "steps": 4},
    ],
    ids=["XLA", "eager", "reference", "accumulation"],
)
def test_every_way_to_train_gives_the_same_weights(arguments, expected):
    assert relative_difference(fit(**arguments), expected) < 1e-4


def test_the_same_training_gives_the_same_bits(expected):
    np.testing.assert_array_equal(fit(jit_compile=False), expected)


def test_mirrored_strategy_equals_one_replica(mirrored, expected):
    assert relative_difference(fit(mirrored, jit_compile=False), expected) < 1e-4


def test_the_limit_is_on_or_off():
    with pytest.raises(ValueError, match=r"`limits_norms`.*Received: limits_norms=1"):
        nlcg_tf.preconditioner.Spectral(limits_norms=1)


@pytest.mark.parametrize("length", [0, -1.0, np.inf, "long", True])
def test_a_length_of_vectors_that_is_not_positive_is_refused(length):
    with pytest.raises(ValueError, match=r"`vector_length`.*Received: vector_length="):
        nlcg_tf.preconditioner.Spectral(length)


class WholeKernels(nlcg_tf.preconditioner.Preconditioner):
    """One of a user's own: rows of kernels are divided by a running mean of their squares."""

    couples = "variable"
    uses_weights = True

    def initial_state(self, shape):
        return {"rows": (shape[:1], 1.0)} if len(shape) > 1 else {}

    def update(self, state, g, w, y, s, gain_ratio, sums):
        rows = [
            None if old is None else old / 2 + keras.ops.mean(g_i * g_i, axis=1) / 2
            for old, g_i in zip(state["rows"], g)
        ]
        return {"rows": rows}, True

    def apply(self, state, g, w, epsilon, sums):
        assert len(w) == len(g)
        scaled = [
            g_i if rows is None else g_i / rows[:, None] for rows, g_i in zip(state["rows"], g)
        ]
        return scaled, keras.ops.full((), 3.0)


def test_a_state_of_another_shape_belongs_to_its_variable(fused):
    """Also a skipped update leaves it alone."""
    kernel, vector = keras.Variable(np.zeros((2, 3), "float32")), keras.Variable([0.0, 0.0])
    optimizer = NLCG(1.0, "fletcher_reeves", WholeKernels(), nesterov=False, fused=fused)
    gradients = [tf.constant([[1.0] * 3, [2.0] * 3]), tf.constant([1.0, 2.0])]
    optimizer.apply(gradients, [kernel, vector])
    np.testing.assert_allclose(kernel.numpy(), [[-1.0] * 3, [-0.8] * 3], rtol=1e-6)
    np.testing.assert_allclose(vector.numpy(), [-1.0, -2.0], rtol=1e-6)
    assert optimizer.slots["rows"][1] is None
    optimizer.apply([gradients[0] * np.nan, gradients[1]], [kernel, vector])
    np.testing.assert_allclose(optimizer.slots["rows"][0].numpy(), [1.0, 2.5])
    assert optimizer.diagnostics()["preconditioner_mean"] == 3.0
    assert optimizer.diagnostics()["skipped_updates"] == 1


def test_a_state_may_have_the_name_of_a_slot_of_the_op(rng, fused_library):
    weights, gradients = draw(rng), draw(rng)
    ends = []
    for path in (False, True):
        optimizer = NLCG(0.1, "momentum", MeanSquares(), fused=path)
        variables = [keras.Variable(w) for w in weights]
        for _ in range(3):
            optimizer.apply([tf.constant(g) for g in gradients], variables)
        ends.append(flat(variables))
    assert relative_difference(*ends) < 1e-5


def test_a_state_that_elements_cannot_share_is_refused():
    class Wrong(WholeKernels):
        couples = "elements"

    optimizer = NLCG(preconditioner=Wrong())
    with pytest.raises(ValueError, match=r"couples elements.*'rows'.*Received: shape=\(2,\)"):
        optimizer.build([keras.Variable(np.zeros((2, 3)))])


@pytest.mark.parametrize("couples", ["rows", None])
def test_a_coupling_that_there_is_not_is_refused(couples):
    wrong = WholeKernels()
    wrong.couples = couples
    with pytest.raises(ValueError, match=r"`couples`.*Received.*couples="):
        NLCG(preconditioner=wrong)


def test_norms_of_what_couples_elements_cannot_be_limited():
    class Wrong(nlcg_tf.preconditioner.Preconditioner):
        limits_norms = True

    with pytest.raises(ValueError, match=r"limits norms.*Received.*couples='elements'"):
        NLCG(preconditioner=Wrong())


def test_an_object_without_the_interface_is_refused():
    class Old:
        def initial_state(self):
            return {}

        update = apply = initial_state

    with pytest.raises(ValueError, match=r"`preconditioner`.*a Preconditioner.*Received"):
        NLCG(preconditioner=Old())


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_variables_that_are_no_floating_point_numbers_are_refused(dtype):
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype, name="odd")
    with pytest.raises(ValueError, match=rf"'odd' of dtype {dtype}"):
        make_optimizer().build([variable])
