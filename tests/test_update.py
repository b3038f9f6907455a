"""The update itself, against the float64 oracle and what is known of conjugate gradients."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import SHAPES, flat, make_oracle, paper_nlcg, relative_difference

from nlcg_tf import NLCG

RULES = ("fletcher_reeves", "polak_ribiere", "blended")
PRECONDITIONERS = ("bfgs", "normalized_bfgs", "rms", None)
LINE_SEARCHES = ("online", "step", None)
# The paper's rules with every line search, Fletcher-Reeves with every preconditioner too; each form
# that came later with one of them.
PAPER_FORMS = list(itertools.product(RULES[:2], ("bfgs", None), LINE_SEARCHES, [False]))
PAPER_FORMS += itertools.product(RULES[:1], ("normalized_bfgs", "rms"), LINE_SEARCHES, [False])
DEFAULT = ("blended", "normalized_bfgs", None, True)
OTHER_FORMS = [
    (rule, preconditioner, LINE_SEARCHES[(i + j + nesterov) % 3], nesterov)
    for i, rule in enumerate(RULES)
    for j, preconditioner in enumerate(PRECONDITIONERS)
    for nesterov in (False, True)
    if (rule, preconditioner, None, nesterov) not in PAPER_FORMS
] + [DEFAULT]


@pytest.fixture(params=[False, True], ids=["composed", "fused"])
def fused(request):
    """Both paths; the second only where the op is built."""
    if request.param:
        request.getfixturevalue("fused_library")
    return request.param


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
    names = ("beta", "step_size", "curvature", "cosine", "kappa", "preconditioner_mean")
    expected = [getattr(oracle, name) for name in names]
    actual = [diagnostics[name] for name in names]
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-6)
    assert diagnostics["learning_rate_scale"] == pytest.approx(oracle.scale, rel=1e-5)


@pytest.mark.parametrize("rule, preconditioner, line_search, nesterov", PAPER_FORMS + OTHER_FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_100_updates_agree_with_oracle(rule, preconditioner, line_search, nesterov, dtype, fused):
    keras.config.set_floatx(dtype)
    optimizer = NLCG(0.1, rule, preconditioner, line_search, nesterov, fused=fused)
    # Polak-Ribiere's beta subtracts two close sums.
    bounds = {"fletcher_reeves": 1e-5, "polak_ribiere": 1e-4, "blended": 1e-5}
    check_against_oracle(optimizer, dtype, 1e-12 if dtype == "float64" else bounds[rule])


@pytest.mark.parametrize(
    "rule, preconditioner, line_search, nesterov", PAPER_FORMS[::3] + OTHER_FORMS
)
@pytest.mark.parametrize("settings", [{"lars_coefficient": 0.02}, {"weight_decay": 0.01}])
def test_lars_and_weight_decay_agree_with_oracle(
    rule, preconditioner, line_search, nesterov, settings, fused
):
    keras.config.set_floatx("float64")
    optimizer = NLCG(0.1, rule, preconditioner, line_search, nesterov, **settings, fused=fused)
    decay = settings.get("weight_decay", 0.0)
    check_against_oracle(optimizer, "float64", 1e-12, updates=30, weight_decay=decay)


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


NOT_FINITE = (np.nan, np.inf, -np.inf)


SETTINGS = [
    ("fletcher_reeves", "bfgs", "online", False),
    DEFAULT,
    ("blended", "rms", None, True),
    ("fletcher_reeves", "rms", "online", True),
    ("polak_ribiere", None, "step", True),
]


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize(
    "settings, graph", [(SETTINGS[0], False), *((settings, True) for settings in SETTINGS)]
)
def test_a_non_finite_update_leaves_every_bit_alone(where, bad, settings, graph, rng, fused):
    shapes = [(3, 2), (4,)]
    variables = [keras.Variable(rng.normal(size=s).astype("float32")) for s in shapes]
    other = {"lars_coefficient": 0.1, "weight_decay": 0.1, "use_ema": True, "fused": fused}
    optimizer = NLCG(0.1, *settings, **other)

    def step(gradients, loss):
        optimizer.observe_loss(loss)
        optimizer.apply(gradients, variables)

    if graph:
        optimizer.build(variables)
        step = tf.function(step)

    def gradients():
        return [tf.constant(rng.normal(size=s), tf.float32) for s in shapes]

    for loss in (1.0, 0.9):
        step(gradients(), tf.constant(loss))
    watched = [*variables, *optimizer.variables]
    watched = [v for v in watched if v.path.split("/")[-1] not in COUNTERS]
    before = [v.numpy().tobytes() for v in watched]
    poisoned, loss = gradients(), 0.8
    if where == "gradient":
        poisoned[1] = tf.constant([0.0, 0.0, bad, 0.0])
    else:
        loss = bad
    step(poisoned, tf.constant(loss, tf.float32))
    for variable, bits in zip(watched, before):
        assert variable.numpy().tobytes() == bits, variable.path
    assert optimizer.diagnostics()["skipped_updates"] == 1
    assert optimizer.diagnostics()["updates"] == 2
    step(gradients(), tf.constant(0.7))
    assert optimizer.diagnostics()["updates"] == 3


# What a skipped update may change: the counters of attempts, and the loss that was observed.
COUNTERS = ("iteration", "counts", "observed_loss")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_huge_and_tiny_gradients_do_not_poison_the_state(rule, preconditioner, nesterov, fused):
    """Squares of 1e25 overflow float32, those of 1e-30 vanish; neither may leave a NaN."""
    for magnitude in (1e25, 1e-30, 1e-42):
        variable = keras.Variable([1.0, 2.0, 3.0])
        optimizer = NLCG(1e-3, rule, preconditioner, None, nesterov, fused=fused)
        for sign in (1.0, -1.0, 1.0):
            optimizer.observe_loss(1.0)
            optimizer.apply([tf.constant([magnitude, 0.0, sign * magnitude])], [variable])
        kept = [variable, *(v for slot in optimizer.slots.values() for v in slot)]
        assert np.isfinite(flat(v.numpy() for v in kept)).all(), magnitude
        # What is not made anew by the next update.
        reals = dict(zip(optimizer.real_names, optimizer.reals.numpy()))
        means = ("left_over", "foretold", "mean_square", "first_square", "mean_length")
        assert np.isfinite([reals[name] for name in means]).all(), (magnitude, reals)
        assert optimizer.diagnostics()["skipped_updates"] == 0


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS[1:])  # plain BFGS's h is huge there
def test_one_huge_gradient_does_not_undo_the_training(preconditioner, fused):
    """The blended rule's steps are at most twice as long as the mean of those before.

    It points ahead, so that its curvature is negative and BFGS cannot answer it.
    """
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(0)
    variable = keras.Variable(np.zeros(50), dtype="float64")
    optimizer = NLCG(0.01, "blended", preconditioner, None, nesterov=True, fused=fused)
    oracle = make_oracle(optimizer, [variable.numpy()])
    step, lengths = None, []
    for t in range(40):
        before = variable.numpy()
        gradient = rng.normal(size=50)
        if t == 30:
            gradient = -7000 * step / np.linalg.norm(step)
        optimizer.observe_loss(1.0 + t % 2)
        optimizer.apply([tf.constant(gradient)], [variable])
        oracle.update(gradient, 1.0 + t % 2, 0.01)
        step = variable.numpy() - before
        lengths.append(np.linalg.norm(step))
    assert relative_difference(variable.numpy(), oracle.w) < 1e-12
    assert oracle.capped > 0
    assert max(lengths[30:]) < 3 * max(lengths[10:30])


def test_same_bits_for_any_number_of_threads(fused):
    """The fixed-order sums promise it; each thread count needs a process of its own."""
    import subprocess
    import sys

    script = """
import sys
import numpy as np, keras, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
from nlcg_tf import NLCG
rng = np.random.default_rng(0)
variables = [keras.Variable(rng.normal(size=n).astype("float32")) for n in (1000003, 4097, 63)]
optimizer = NLCG(0.01, "polak_ribiere", "bfgs", None, False, fused=sys.argv[2] == "True")
for _ in range(5):
    gradients = [tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables]
    optimizer.apply(gradients, variables)
import hashlib
bits = b"".join(v.numpy().tobytes() for v in [*variables, *optimizer.variables])
print(hashlib.sha256(bits).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", script, str(threads), str(fused)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in (1, 2, 8)
    }
    assert len(digests) == 1


class SignDescent:
    """A preconditioner of a user's own: z = -sign(g), with a count of its calls as its slot."""

    uses_steps = False

    def initial_state(self):
        return {"calls": 0.0}

    def update(self, state, g, y, s, kappa):
        return {"calls": [calls + 1 for calls in state["calls"]]}, True

    def apply(self, state, g, epsilon):
        return [keras.ops.sign(g_i) for g_i in g], keras.ops.ones(())


def test_a_preconditioner_of_ones_own_is_used():
    """On the composed path, and without a slot for the gradient that nobody looks at."""
    variable = keras.Variable([1.0, 2.0])
    optimizer = paper_nlcg(0.1, preconditioner=SignDescent(), line_search=None)
    for gradient in ([3.0, -5.0], [0.0, -1.0]):
        optimizer.apply([tf.constant(gradient)], [variable])
    # beta = 1 / 8 in the second update.
    np.testing.assert_allclose(variable.numpy(), [0.9 - 0.1 / 8, 2.2 + 0.1 / 8], rtol=1e-6)
    assert set(optimizer.slots) == {"calls", "direction"}
    np.testing.assert_array_equal(optimizer.slots["calls"][0].numpy(), [2.0, 2.0])


def test_a_slot_with_a_name_of_the_optimizer_is_refused():
    preconditioner = SignDescent()
    preconditioner.initial_state = lambda: {"direction": 0.0}
    with pytest.raises(ValueError, match=r"`preconditioner`.*direction.*Received"):
        paper_nlcg(preconditioner=preconditioner).build([keras.Variable([1.0])])


@pytest.mark.parametrize(
    "rule, preconditioner, slots",
    [
        ("fletcher_reeves", None, 1),
        ("fletcher_reeves", "rms", 2),
        ("polak_ribiere", None, 2),
        ("blended", "rms", 3),
        ("fletcher_reeves", "normalized_bfgs", 3),
    ],
)
def test_there_are_no_more_slots_than_needed(rule, preconditioner, slots):
    optimizer = paper_nlcg(0.1, rule, preconditioner)
    optimizer.build([keras.Variable(np.zeros(1000, "float32"))])
    assert sum(np.prod(v.shape) == 1000 for v in optimizer.variables) == slots


@pytest.mark.parametrize("shared, least, most", [(True, 0.99, 1.0), (False, 0.0, 0.1)])
def test_kappa_tells_noise_from_bad_conditioning(shared, least, most, rng):
    """A badly conditioned least-squares problem: the same rows in each update, or others."""
    scales = np.logspace(0, -2, 20)
    rows = rng.normal(size=(4000, 20)) * scales
    targets = rows @ rng.normal(size=20) + rng.normal(size=4000)
    variable = keras.Variable(np.zeros(20, "float32"))
    optimizer = NLCG(0.1)
    kappas = []
    for t in range(60):
        chosen = slice(0, 50) if shared else slice(50 * t, 50 * (t + 1))
        x = tf.constant(rows[chosen], tf.float32)
        with tf.GradientTape() as tape:
            error = tf.linalg.matvec(x, variable.value) - targets[chosen].astype("float32")
            loss = tf.reduce_mean(error**2)
        optimizer.observe_loss(loss)
        optimizer.apply([tape.gradient(loss, variable.value)], [variable])
        kappas.append(optimizer.diagnostics()["kappa"])
    assert least <= np.median(kappas[20:]) <= most


def test_steps_keep_their_length_as_noisy_gradients_shrink():
    """kappa 0: a gradient a tenth as long, and then for long, makes steps that are no shorter."""
    variable = keras.Variable(np.zeros(4, "float32"))
    optimizer = NLCG(0.1, preconditioner=None, momentum=0.0)
    lengths = []
    for t in range(1000):
        before = variable.numpy()
        optimizer.observe_loss(1.0 + t % 2)
        gradient = np.full(4, 1.0 if t == 0 else 0.1, "float32")
        optimizer.apply([tf.constant(gradient)], [variable])
        lengths.append(np.linalg.norm(variable.numpy() - before))
    assert lengths[0] == pytest.approx(0.2, rel=1e-5)
    assert lengths[1] == pytest.approx(0.02, rel=0.01)
    assert lengths[-1] == pytest.approx(0.2, rel=0.01)
