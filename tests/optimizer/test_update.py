"""The update itself, against the float64 oracle and what is known of conjugate gradients."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlcg_tf import NLCG
from tests.support.problems import (
    DEFAULT,
    LINE_SEARCHES,
    PRECONDITIONERS,
    RULES,
    SHAPES,
    flat,
    make_oracle,
    paper_nlcg,
    relative_difference,
)

# The paper's rules with every line search, Fletcher-Reeves with every preconditioner too; each form
# that came later with one of them.
PAPER_FORMS = list(itertools.product(RULES[:2], ("bfgs", None), LINE_SEARCHES, [False]))

PAPER_FORMS += itertools.product(RULES[:1], ["normalized_bfgs"], LINE_SEARCHES, [False])


OTHER_FORMS = [
    (rule, preconditioner, LINE_SEARCHES[(i + j + nesterov) % 3], nesterov)
    for i, rule in enumerate(RULES)
    for j, preconditioner in enumerate(PRECONDITIONERS)
    for nesterov in (False, True)
    if (rule, preconditioner, None, nesterov) not in PAPER_FORMS
] + [DEFAULT]
FORMS = PAPER_FORMS + OTHER_FORMS


def run_beside_oracle(optimizer, dtype, updates=100, weight_decay=0.0, shapes=SHAPES):
    """The largest relative difference of an update; also checks that there is one trace."""
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    scales = [rng.uniform(0.5, 5, size=shape) for shape in shapes]
    variables = [keras.Variable(x, dtype=dtype) for x in start]
    optimizer.build(variables)
    oracle = make_oracle(optimizer, start)

    @tf.function
    def step(gradients, loss):
        optimizer.observe_loss(loss)
        optimizer.apply(gradients, variables)

    worst = 0.0
    for t in range(updates):
        learning_rate = np.asarray(0.06 * (1.5 + np.cos(t / 10)), keras.config.floatx())
        optimizer.learning_rate = learning_rate
        weights = [v.numpy() for v in variables]
        before, oracle_before = flat(weights), oracle.w.copy()
        # A quadratic with noise: gradients depend on the weights, as in training.
        gradients = [
            (s * w + 0.05 * rng.normal(size=w.shape)).astype(dtype) for s, w in zip(scales, weights)
        ]
        # It follows the gradients, the less the longer, and jumps for the line searches.
        loss = sum(np.sum(s * w.astype(float) ** 2) for s, w in zip(scales, weights)) / 2
        loss *= 1 + 0.1 * (t % 7 == 6) + 0.005 * t * rng.normal()
        loss = np.asarray(loss, keras.config.floatx())
        step([tf.constant(g) for g in gradients], loss)
        oracle.update(flat(gradients), float(loss), float(learning_rate), weight_decay)
        update = flat(v.numpy() for v in variables) - before
        worst = max(worst, relative_difference(update, oracle.w - oracle_before))
    assert step.experimental_get_tracing_count() == 1
    return worst, oracle


def check_against_oracle(optimizer, dtype, bound, **arguments):
    worst, oracle = run_beside_oracle(optimizer, dtype, **arguments)
    assert worst <= bound
    diagnostics = optimizer.diagnostics()
    assert diagnostics["updates"] == oracle.updates and diagnostics["skipped_updates"] == 0
    assert diagnostics["rejected_curvatures"] == oracle.rejected
    names = ("beta", "step_size", "curvature", "cosine", "gain_ratio", "preconditioner_mean")
    expected = [getattr(oracle, name) for name in names]
    actual = [diagnostics[name] for name in names]
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-6)
    assert diagnostics["learning_rate_scale"] == pytest.approx(oracle.scale, rel=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_100_updates_agree_with_oracle(form, fused):
    keras.config.set_floatx("float64")
    check_against_oracle(NLCG(0.1, *form, fused=fused), "float64", 1e-12)


# The reference update is the same code for both types, the op is not.
@pytest.mark.parametrize(
    "form, fused",
    [*((form, True) for form in FORMS), *((form, False) for form in FORMS[::3])],
    indirect=["fused"],
    ids=str,
)
def test_100_updates_in_float32_agree_with_oracle(form, fused):
    # Polak-Ribiere's beta subtracts two close sums.
    bounds = {"fletcher_reeves": 1e-5, "polak_ribiere": 1e-4, "blended": 1e-5}
    check_against_oracle(NLCG(0.1, *form, fused=fused), "float32", bounds[form[0]])


@pytest.mark.parametrize(
    "rule, preconditioner, line_search, nesterov", PAPER_FORMS[::3] + OTHER_FORMS
)
def test_lars_and_weight_decay_agree_with_oracle(
    rule, preconditioner, line_search, nesterov, fused
):
    keras.config.set_floatx("float64")
    settings = {"lars_coefficient": 0.02, "weight_decay": 0.01}
    optimizer = NLCG(0.1, rule, preconditioner, line_search, nesterov, **settings, fused=fused)
    check_against_oracle(optimizer, "float64", 1e-12, updates=30, weight_decay=0.01)


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-12)])
def test_1000_updates_do_not_drift(dtype, bound, fused_library):
    """BFGS carries two sums from update to update. (Plain BFGS: noise makes its steps vanish.)"""
    keras.config.set_floatx(dtype)
    optimizer = paper_nlcg(0.1, "fletcher_reeves", "normalized_bfgs", fused=True)
    check_against_oracle(optimizer, dtype, bound, updates=1000)
    assert (optimizer.curvature_sums.numpy()[:, 2] >= 0).all()


def test_the_runs_above_exercise_preconditioner_and_line_search():
    """They would prove little if h stayed 1 or the scale never moved."""
    optimizer = paper_nlcg(0.1)
    run_beside_oracle(optimizer, "float32", updates=50)  # half-way: later noise lets all h grow
    h = flat(v.numpy() for v in optimizer.slots["hessian_diagonal"])
    assert h.min() < 0.9 and h.max() > 1.5
    assert optimizer.diagnostics()["learning_rate_scale"] < 1


@pytest.mark.parametrize("rule", RULES)
def test_rejected_curvature_agrees_with_oracle(rule, rng, fused):
    """Random gradients: y^T s takes both signs."""
    keras.config.set_floatx("float64")
    variable = keras.Variable(rng.normal(size=30), dtype="float64")
    optimizer = paper_nlcg(0.01, rule, line_search=None, fused=fused)
    oracle = make_oracle(optimizer, [variable.numpy()])
    for _ in range(40):
        gradient = rng.normal(size=30)
        optimizer.observe_loss(1.0)
        optimizer.apply([tf.constant(gradient)], [variable])
        oracle.update(gradient, 1.0, 0.01)
    assert relative_difference(variable.numpy(), oracle.w) < 1e-12
    assert optimizer.diagnostics()["rejected_curvatures"] == oracle.rejected
    assert 5 < oracle.rejected < 35


@pytest.mark.parametrize("settings", [("fletcher_reeves", "bfgs", "online", False), DEFAULT])
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("float64", 1e-12)])
def test_large_variables_agree_with_oracle(dtype, bound, settings, fused):
    """Sums of more than one block, with and without a rest; variables without elements."""
    keras.config.set_floatx(dtype)
    shapes = [(4096,), (4097,), (0,), (2, 4096), (16384,), (16385,), (300001,), (), (63,), (64,)]
    worst, _ = run_beside_oracle(NLCG(0.1, *settings, fused=fused), dtype, 10, shapes=shapes)
    assert worst <= bound


def test_a_variable_of_zeros_can_leave_zero_with_lars(fused):
    variable = keras.Variable([0.0, 0.0])
    optimizer = paper_nlcg(0.5, lars_coefficient=0.1, line_search=None, fused=fused)
    optimizer.apply([tf.constant([1.0, 2.0])], [variable])
    np.testing.assert_allclose(variable.numpy(), [-0.5, -1.0], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES[:2])
def test_linear_cg_solves_a_quadratic_in_n_steps(rule):
    """With h = 1 and exact steps NLCG is linear CG: at most n steps, conjugate directions."""
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(3)
    n = 6
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    a = q @ np.diag([1.0, 1.3, 1.6, 2.0, 2.6, 3.5]) @ q.T
    w = keras.Variable(rng.normal(size=n), dtype="float64")
    optimizer = paper_nlcg(1.0, rule, preconditioner=None, line_search=None, epsilon=1e-30)
    directions = []
    for _ in range(n):
        g = a @ w.numpy()
        # The direction that the update is going to take, to choose the exact step along it.
        probe = keras.Variable(w.numpy(), dtype="float64")
        twin = paper_nlcg(1.0, rule, preconditioner=None, line_search=None, epsilon=1e-30)
        twin.build([probe])
        if optimizer.built:
            for target, source in zip(twin.variables, optimizer.variables):
                target.assign(source)
        twin.learning_rate = 1.0
        twin.apply([tf.constant(g)], [probe])
        d = probe.numpy() - w.numpy()
        optimizer.learning_rate = -(g @ d) / (d @ a @ d)
        optimizer.apply([tf.constant(g)], [w])
        directions.append(d)
    assert np.linalg.norm(a @ w.numpy()) < 1e-10
    conjugacy = np.array([[u @ a @ v for v in directions] for u in directions])
    off_diagonal = conjugacy - np.diag(np.diag(conjugacy))
    assert np.abs(off_diagonal).max() < 1e-10 * np.diag(conjugacy).max()


def test_neutral_settings_equal_sgd():
    """beta = 0 on the first update, h = 1 and a fixed step: plain gradient descent."""
    a, b = keras.Variable([1.0, -2.0]), keras.Variable([1.0, -2.0])
    gradient = tf.constant([0.3, 0.7])
    paper_nlcg(0.1, preconditioner=None, line_search=None).apply([gradient], [a])
    keras.optimizers.SGD(0.1).apply([gradient], [b])
    np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-6)


def test_the_direction_descends(rng):
    """The cosine of direction and negative gradient stays positive on a convex problem."""
    w = keras.Variable(rng.normal(size=50).astype("float32"))
    curvature = tf.constant(rng.uniform(0.1, 3, size=50), tf.float32)
    optimizer = paper_nlcg(0.05)
    for _ in range(50):
        optimizer.observe_loss(tf.reduce_sum(curvature * w.value**2) / 2)
        optimizer.apply([curvature * w.value], [w])
        assert optimizer.diagnostics()["cosine"] > 0
