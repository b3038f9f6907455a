"""What the forms of the update promise besides agreeing with the oracle."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import nlcg_tf
from nlcg_tf import NLCG, noise
from tests.support.problems import paper_nlcg


class SignDescent(nlcg_tf.preconditioner.Preconditioner):
    """A preconditioner of a user's own: z = -sign(g), with a count of its calls as its slot."""

    def initial_state(self, shape):
        return {"calls": (shape, 0.0)}

    def update(self, state, g, w, y, s, gain_ratio, sums):
        return {"calls": [calls + 1 for calls in state["calls"]]}, True

    def apply(self, state, g, w, epsilon, sums):
        return [keras.ops.sign(g_i) for g_i in g], keras.ops.ones(())


def test_a_preconditioner_of_ones_own_is_used():
    """On the reference path, and without a slot for the gradient that nobody looks at."""
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
    preconditioner.initial_state = lambda shape: {"direction": (shape, 0.0)}
    with pytest.raises(ValueError, match=r"`preconditioner`.*direction.*Received"):
        paper_nlcg(preconditioner=preconditioner).build([keras.Variable([1.0])])


@pytest.mark.parametrize(
    "state, words",
    [
        ({"step_size": 1.0}, "has a state of the optimizer's own name: step_size"),
        ({"previous_loss": 0.0}, "must have a state `learning_rate_scale`"),
    ],
)
def test_a_line_search_with_another_state_than_it_must_have_is_refused(state, words):
    class Fixed:
        def initial_state(self):
            return state

        def update(self, state, loss, updates):
            return state

    optimizer = NLCG(line_search=Fixed())
    with pytest.raises(ValueError, match=f"`line_search` {words}.*Received: line_search=.*Fixed"):
        optimizer.build([keras.Variable([1.0])])


class Returns(SignDescent):
    """What it is told to, right or wrong."""

    def __init__(self, change, result, mean=1.0, accepted=True):
        self.change, self.result, self.mean, self.accepted = change, result, mean, accepted

    def update(self, state, g, w, y, s, gain_ratio, sums):
        if self.change is not None:
            changed = self.change(state)
            state = state if changed is None else changed
        return state, self.accepted

    def apply(self, state, g, w, epsilon, sums):
        return self.result, self.mean


@pytest.mark.parametrize("fused", [False, "auto"])
@pytest.mark.parametrize(
    "returned, words",
    [
        ((dict.clear, [tf.ones(2)]), r"must return the states \['calls'\]. Received: \[\]$"),
        ((lambda s: s.update(calls=[]), [tf.ones(2)]), r"'calls' in .*\(2,\)\]. Received: \[\]$"),
        ((lambda s: s.update(calls=[1.0]), [tf.ones(2)]), r"'calls' in .* Received: \[1.0\]$"),
        ((lambda s: s["calls"].clear(), [tf.ones(2)]), r"'calls' in .*\(2,\)\]. Received: \[\]$"),
        ((None, [tf.ones(1)]), r"P g in the shapes \[\(2,\)\]. Received: \[\(1,\)\]$"),
        ((None, [tf.ones(2)], [1.0, 2.0]), r"a scalar as the mean .* Received: \[1.0, 2.0\]$"),
        ((None, None), r"P g in .* Received: None$"),
        ((lambda s: [1], [tf.ones(2)]), r"must return the states \['calls'\]. Received: \[1\]$"),
        ((None, [tf.ones(2)], 1.0, None), "a scalar as whether it accepted .* Received: None$"),
        ((None, [tf.ones(2)], 1.0, [True] * 2), r"whether it accepted .*\[True, True\]$"),
    ],
)
def test_what_a_preconditioner_returns_is_checked(returned, words, fused):
    """Alike by the fused op and the reference update, also what is changed in place."""
    variable = keras.Variable([1.0, 2.0])
    optimizer = NLCG(0.1, "momentum", Returns(*returned), fused=fused)
    with pytest.raises(ValueError, match=words):
        optimizer.apply([tf.ones(2)], [variable])
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])


@pytest.mark.parametrize("fused", [False, "auto"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("calls", [[2.0, 2.0], tf.constant([2, 2]), np.full(2, 2.0)])
def test_a_preconditioner_may_return_numbers_of_another_type(calls, dtype, fused):
    variable = keras.Variable([1.0, 2.0], dtype=dtype)
    returned = Returns(lambda s: {"calls": [calls]}, (calls,), np.float64(1), 1)
    optimizer = NLCG(0.5, "momentum", returned, fused=fused, nesterov=False)
    optimizer.build([variable])
    tf.function(lambda g: optimizer.apply([g]))(tf.ones(2))
    np.testing.assert_array_equal(variable.numpy(), [0.0, 1.0])
    np.testing.assert_array_equal(optimizer.slots["calls"][0].numpy(), [2.0, 2.0])


@pytest.mark.parametrize("fused", [False, "auto"])
def test_a_preconditioner_may_return_shapes_that_a_graph_does_not_know(fused):
    class Unknown(SignDescent):
        def apply(self, state, g, w, epsilon, sums):
            return [tf.numpy_function(np.sign, [x], x.dtype) for x in g], 1.0

    variable = keras.Variable([1.0, 2.0])
    optimizer = NLCG(0.5, "momentum", Unknown(), fused=fused, nesterov=False)
    optimizer.build([variable])
    tf.function(lambda g: optimizer.apply([g]))(tf.ones(2))
    np.testing.assert_array_equal(variable.numpy(), [0.5, 1.5])


class Changing:
    """A line search that makes a change of its state, right or wrong."""

    def __init__(self, change):
        self.change = change

    def initial_state(self):
        return {"learning_rate_scale": 1.0, "own": 0.0}

    def update(self, state, loss, updates):
        self.change(state)
        return state


@pytest.mark.parametrize("fused", [False, "auto"])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("own"), r"the states .* Received: \['learning_rate_scale'\]$"),
        (lambda s: s.update(beta=0.5), r"the states .* Received: \['beta', 'learning_rate_scale'"),
        (lambda s: s.update(own=[1.0]), r"a scalar as 'own'. Received: \[1.0\]$"),
    ],
)
def test_what_a_line_search_returns_is_checked(change, words, fused):
    variable = keras.Variable([1.0])
    optimizer = NLCG(0.1, "momentum", line_search=Changing(change), fused=fused)
    optimizer.observe_loss(1.0)
    with pytest.raises(ValueError, match=words):
        optimizer.apply([tf.ones(1)], [variable])
    assert variable.numpy() == [1.0]


@pytest.mark.parametrize("fused", [False, "auto"])
def test_a_line_search_may_keep_numbers_of_another_type(fused):
    change = lambda s: s.update(own=np.float64(3))  # noqa: E731
    optimizer = NLCG(0.1, "momentum", line_search=Changing(change), fused=fused)
    optimizer.observe_loss(1.0)
    optimizer.apply([tf.ones(1)], [keras.Variable([1.0])])
    assert optimizer.reals.numpy()[-1] == 3


@pytest.mark.parametrize(
    "rule, preconditioner, slots",
    [
        ("fletcher_reeves", None, 1),
        ("polak_ribiere", None, 2),
        ("blended", None, 2),
        ("fletcher_reeves", "normalized_bfgs", 3),
    ],
)
def test_there_are_no_more_slots_than_needed(rule, preconditioner, slots):
    optimizer = paper_nlcg(0.1, rule, preconditioner)
    optimizer.build([keras.Variable(np.zeros(1000, "float32"))])
    assert sum(np.prod(v.shape) == 1000 for v in optimizer.variables) == slots


@pytest.mark.parametrize("shared, least, most", [(True, 0.99, 1.0), (False, 0.0, 0.1)])
def test_gain_ratio_tells_noise_from_bad_conditioning(shared, least, most, rng):
    """A badly conditioned least-squares problem: the same rows in each update, or others."""
    scales = np.logspace(0, -2, 20)
    rows = rng.normal(size=(4000, 20)) * scales
    targets = rows @ rng.normal(size=20) + rng.normal(size=4000)
    variable = keras.Variable(np.zeros(20, "float32"))
    optimizer = NLCG(0.1)
    ratios = []
    for t in range(60):
        chosen = slice(0, 50) if shared else slice(50 * t, 50 * (t + 1))
        x = tf.constant(rows[chosen], tf.float32)
        with tf.GradientTape() as tape:
            error = tf.linalg.matvec(x, variable.value) - targets[chosen].astype("float32")
            loss = tf.reduce_mean(error**2)
        optimizer.observe_loss(loss)
        optimizer.apply([tape.gradient(loss, variable.value)], [variable])
        ratios.append(optimizer.diagnostics()["gain_ratio"])
    assert least <= np.median(ratios[20:]) <= most


def test_steps_keep_their_length_as_noisy_gradients_shrink():
    """With a gain ratio of 0 a gradient a tenth as long makes steps that are as long as before."""
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


def test_a_constant_in_the_loss_does_not_change_the_gain_ratio():
    """Losses that fall by orders, which gradients predict the worse the longer."""

    def gain_ratios(constant):
        rng = np.random.default_rng(0)
        last, means, ratios = 100.0, [tf.constant(0.0)] * 2, []
        for t in range(1, 20):
            loss = last * (0.8 + 0.04 * t * rng.uniform(-1, 1))
            known = (loss + constant, last + constant, -0.2 * last, -0.2 * last)
            known = [tf.constant(x, tf.float32) for x in known]
            ratio, *means = noise.measure_gain_ratio(*known, *means, t)
            ratios.append(float(ratio))
            last = loss
        return ratios

    ratios = gain_ratios(0.0)
    assert min(ratios) < 0.6 and max(ratios) > 0.9
    np.testing.assert_allclose(gain_ratios(50.0), ratios, atol=2e-3)
