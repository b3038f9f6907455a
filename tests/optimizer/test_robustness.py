"""Values that are not finite, huge or tiny, and numbers of threads."""

import itertools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from nlcg_tf import NLCG
from tests.support.launch import PYTHON, run
from tests.support.problems import (
    DEFAULT,
    PRECONDITIONERS,
    RULES,
    flat,
    make_oracle,
    paper_nlcg,
    relative_difference,
)

NOT_FINITE = (np.nan, np.inf, -np.inf)

SETTINGS = [
    ("fletcher_reeves", "bfgs", "online", False),
    DEFAULT,
    ("fletcher_reeves", "spectral", "online", True),
    ("polak_ribiere", None, "step", True),
]


@pytest.mark.parametrize(
    "settings, graph", [(SETTINGS[0], False), *((settings, True) for settings in SETTINGS)]
)
def test_a_non_finite_update_leaves_every_bit_alone(settings, graph, rng, fused):
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
    for done, (bad, where) in enumerate(itertools.product(NOT_FINITE, ["gradient", "loss"])):
        before = [v.numpy().tobytes() for v in watched]
        poisoned, loss = gradients(), 0.8
        if where == "gradient":
            poisoned[1] = tf.constant([0.0, 0.0, bad, 0.0])
        else:
            loss = bad
        step(poisoned, tf.constant(loss, tf.float32))
        for variable, bits in zip(watched, before):
            assert variable.numpy().tobytes() == bits, (variable.path, bad, where)
        assert optimizer.diagnostics()["skipped_updates"] == done + 1
        assert optimizer.diagnostics()["updates"] == done + 2
        step(gradients(), tf.constant(0.7))
        assert optimizer.diagnostics()["updates"] == done + 3


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
        means = (
            "prediction_error",
            "predicted_change",
            "mean_squared_norm",
            "first_squared_norm",
            "mean_update_norm",
        )
        assert np.isfinite([reals[name] for name in means]).all(), (magnitude, reals)
        assert optimizer.diagnostics()["skipped_updates"] == 0


def test_a_norm_factor_that_overflows_the_step_size_is_left_out(fused):
    optimizer = NLCG(1e-3, fused=fused)
    w = keras.Variable(np.ones(4, "float32"))
    for rate, gradient in ((1e-3, 1.0), (3.4e38, 1e-3)):
        optimizer.learning_rate = rate
        optimizer.observe_loss(tf.constant(gradient))
        optimizer.apply([tf.fill(4, gradient)], [w])
    shown = optimizer.diagnostics()
    assert (shown["updates"], shown["skipped_updates"]) == (2, 0)
    assert shown["step_size"] == np.float32(3.4e38)


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
    assert oracle.clipped > 0
    assert np.isfinite(lengths).all()
    assert max(lengths[30:]) < 3 * max(lengths[10:30])


def test_other_variables_than_in_the_last_update_are_warned_of(fused):
    a, b = (keras.Variable([1.0, 2.0]) for _ in range(2))
    for rule, warned in (("momentum", False), ("fletcher_reeves", True)):
        optimizer = NLCG(0.1, rule, None, fused=fused)
        optimizer.build([a, b])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.apply([tf.ones(2), tf.ones(2)], [b, a])
            optimizer.apply([tf.ones(2), tf.ones(2)], [a, b])
            assert not any("other variables" in str(w.message) for w in caught)
            optimizer.apply([tf.ones(2)], [b])
        assert any("other variables" in str(w.message) for w in caught) == warned


@pytest.mark.parametrize("factor", [1e6, 1e18, 1e20, 3e38])
def test_training_goes_on_after_one_gradient_of_any_size(factor, fused, rng):
    """Squares of 1e20 overflow float32, and so does the look-ahead's sum of two of 3e38."""
    variable, optimizer = keras.Variable(np.ones((4, 3), "float32")), NLCG(0.03, fused=fused)
    gradient, lengths = np.sign(rng.normal(size=(4, 3))).astype("float32"), []
    for t in range(80):
        before = variable.numpy()
        optimizer.observe_loss(1.0 + t % 2)
        optimizer.apply([gradient * np.float32(factor if t == 20 else 1)], [variable])
        lengths.append(np.linalg.norm(variable.numpy() - before))
    assert np.isfinite(lengths).all()
    assert max(lengths[20:]) < 3 * max(lengths[10:20])
    assert lengths[-1] > 0.5 * lengths[19]
    assert np.isfinite(optimizer.diagnostics()["cosine"])


def test_what_is_clipped_to_zero_may_be_infinite(fused):
    """A small h makes infinity of a finite gradient."""
    variable, optimizer = keras.Variable([1.0, 2.0]), NLCG(0.03, fused=fused)
    optimizer.build([variable])
    optimizer.slots["hessian_diagonal"][0].assign([1e-3, 1.0])
    optimizer.observe_loss(1.0)
    optimizer.apply([tf.constant([1e37, 1.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])
    np.testing.assert_array_equal(optimizer.slots["direction"][0].numpy(), [0.0, 0.0])
    for _ in range(2):  # the last step is made again from P g, which was infinite
        optimizer.observe_loss(1.0)
        optimizer.apply([tf.ones(2)], [variable])
        assert np.isfinite([*optimizer.diagnostics().values(), *variable.numpy()]).all()


def test_a_curvature_beyond_float16_does_not_end_the_training():
    """It would be infinite in its slot, and no element of the variable would move again."""
    variable = keras.Variable([1.0, 1.0], dtype="float16")
    optimizer = paper_nlcg(0.01, "fletcher_reeves", "bfgs", None)
    for t in range(6):
        before = variable.numpy()
        # A step of 2^-10 changes the gradient by 100: a curvature of 10^5.
        gradient = [-0.1 if t == 0 else 100.0 if t == 1 else 0.5, 1.0]
        optimizer.apply([tf.cast(gradient, tf.float16)], [variable])
        h = optimizer.slots["hessian_diagonal"][0].numpy()
        assert np.isfinite(h).all()
    assert h[0] > 6e4 and variable.numpy()[1] < before[1]


def test_same_bits_for_any_number_of_threads(fused):
    """The fixed-order sums promise it; each thread count needs a process of its own."""
    script = """
import sys
import numpy as np, keras, tensorflow as tf
from nlcg_tf import NLCG
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
rng = np.random.default_rng(0)
variables = [keras.Variable(rng.normal(size=n).astype("float32")) for n in (1000003, 4097, 63)]
optimizer = NLCG(0.01, "polak_ribiere", "bfgs", None, False, fused=sys.argv[1] == "True")
for _ in range(5):
    gradients = [tf.constant(rng.normal(size=v.shape), tf.float32) for v in variables]
    optimizer.apply(gradients, variables)
import hashlib
bits = b"".join(v.numpy().tobytes() for v in [*variables, *optimizer.variables])
print(hashlib.sha256(bits).hexdigest())
"""
    done = [run([*PYTHON, "-c", script, fused, threads]) for threads in (1, 2, 8)]
    digests = {result.stdout for result in done}
    assert len(digests) == 1 and len(digests.pop()) == 65, done[0].stderr
