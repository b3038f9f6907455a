"""Bad arguments get an error that names the argument and the value."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import nlcg_tf
from nlcg_tf import NLCG, schedules
from nlcg_tf.line_search import OnlineLineSearch, StepLineSearch
from nlcg_tf.preconditioner import NormalizedBFGS, Preconditioner
from tests.support.problems import regression_data, regression_model


@pytest.mark.parametrize(
    "arguments",
    [
        {"update_rule": "newton"},
        {"update_rule": "nesterov"},
        {"preconditioner": "lbfgs"},
        {"line_search": "armijo"},
        {"line_search": OnlineLineSearch},
        {"line_search": 3},
        {"epsilon": 0},
        {"epsilon": float("nan")},
        {"epsilon": "1e-8"},
        {"lars_coefficient": -0.1},
        {"lars_coefficient": True},
        {"fused": "yes"},
        {"fused": 1},
        {"line_search": {}},
        {"preconditioner": 3},
        {"preconditioner": NormalizedBFGS},
        {"preconditioner": OnlineLineSearch()},
        {"preconditioner": {}},
        {"nesterov": 1},
        {"momentum": 1.0},
        {"momentum": None},
        {"learning_rate": float("nan")},
        {"learning_rate": -0.1},
        {"weight_decay": -0.1},
        {"weight_decay": float("inf")},
        {"weight_decay": np.array([1.0, 2.0])},
        {"update_rule": np.array(["momentum", "x"])},
        {"epsilon": np.float16(1e-8)},  # is 0
        {"learning_rate": 10**400},
        {"clipnorm": -1.0},
        {"clipvalue": "a"},
        {"global_clipnorm": float("nan")},
        {"loss_scale_factor": 0},
        {"ema_momentum": "x"},
        {"ema_momentum": float("nan")},
        {"gradient_accumulation_steps": 2.5},
        {"ema_overwrite_frequency": "3"},
        {"preconditioner": {"class_name": "Dense", "config": {}}},
    ],
    ids=str,
)
def test_nlcg_names_the_bad_argument(arguments):
    (name, value), *_ = arguments.items()
    with pytest.raises(ValueError, match=name) as error:
        NLCG(**arguments)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "name, value", [("lars_coefficient", 0.1), ("preconditioner", None), ("line_search", "online")]
)
def test_what_decides_the_slots_cannot_change_once_they_are_there(name, value):
    optimizer = NLCG()
    setattr(optimizer, name, getattr(optimizer, name))  # before it may
    optimizer.build(regression_model().trainable_variables)
    with pytest.raises(ValueError, match=f"`{name}` cannot change.*Received: {name}={value!r}"):
        setattr(optimizer, name, value)


class WithoutSums(Preconditioner):
    def apply(self, state, g, w, epsilon):
        return g, 1.0


class OfOneVariable(Preconditioner):
    def apply(self, state, g, w, epsilon, sums):
        return g[:1], 1.0


def test_what_a_preconditioner_of_ones_own_takes_and_returns_is_checked():
    with pytest.raises(ValueError, match=r"`apply`.*w, epsilon, sums\).*WithoutSums"):
        NLCG(preconditioner=WithoutSums())
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    for fused in (False, "auto"):
        optimizer = NLCG(1, "fletcher_reeves", OfOneVariable(), fused=fused)
        words = r"OfOneVariable.* P g in the shapes \[\(1,\), \(1,\)\]. Received: \[\(1,\)\]$"
        with pytest.raises(ValueError, match=words):
            optimizer.apply([tf.ones(1), tf.ones(1)], variables)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: OnlineLineSearch(decrease_threshold=0.01, increase_threshold=0.02), "increase_t"),
        (lambda: OnlineLineSearch(decrease_factor=1.5), "decrease_factor"),
        (lambda: OnlineLineSearch(increase_factor=0.5), "increase_factor"),
        (lambda: OnlineLineSearch(minimum_scale=0), "minimum_scale"),
        (lambda: OnlineLineSearch(increase_factor=float("inf")), "increase_factor"),
        (lambda: OnlineLineSearch(decrease_threshold="x"), "decrease_threshold"),
        (lambda: OnlineLineSearch(increase_threshold=None), "increase_threshold` must be a number"),
        (lambda: StepLineSearch(period=0), "period"),
        (lambda: StepLineSearch(period=True), "period"),
        (lambda: NLCG().observe_loss(keras.ops.ones(3)), "loss"),
        (lambda: StepLineSearch(smoothing=1.0), "smoothing"),
        (lambda: StepLineSearch(limits=(1.0, 1.1), factors=(1.0, 1.0)), "limits"),
        (lambda: StepLineSearch(limits=None), "limits"),
        (lambda: StepLineSearch(limits=(1.1,)), "factors"),
        (lambda: NormalizedBFGS(0), "decay"),
        (lambda: NormalizedBFGS(1.1), "decay"),
        (lambda: NormalizedBFGS("0.9"), "decay"),
        (lambda: NormalizedBFGS(float("nan")), "decay"),
        (lambda: schedules.CifarSchedule(0, 200, 10), "batch_size"),
        (lambda: schedules.CifarSchedule(128, -1, 10), "epochs"),
        (lambda: schedules.ImageNetSchedule(128, 90, "10"), "steps_per_epoch"),
        (lambda: nlcg_tf.callbacks.OptimizerDiagnostics("always"), "update_freq"),
    ],
)
def test_the_message_names_the_bad_argument(make, name):
    with pytest.raises(ValueError, match=f"`{name}.*Received"):
        make()


def test_a_line_search_with_own_thresholds_is_used():
    """A rise of 30 % is tolerated by one, punished by the other."""
    scales = []
    for line_search in ("online", OnlineLineSearch(decrease_threshold=0.5, increase_factor=1.0)):
        variable, optimizer = keras.Variable([1.0]), NLCG(0.1, line_search=line_search)
        for loss in (1.0, 1.3):
            optimizer.observe_loss(loss)
            optimizer.apply([keras.ops.ones(1)], [variable])
        scales.append(optimizer.diagnostics()["learning_rate_scale"])
    assert scales == [pytest.approx(0.975), 1.0]


def test_diagnostics_before_and_after_the_first_update():
    names = {
        "beta",
        "step_size",
        "learning_rate_scale",
        "curvature",
        "cosine",
        "gain_ratio",
        "preconditioner_mean",
        "updates",
        "skipped_updates",
        "rejected_curvatures",
    }
    optimizer = NLCG(0.1, "fletcher_reeves")
    assert set(optimizer.diagnostics()) == names
    optimizer.apply([keras.ops.ones(1)], [keras.Variable([1.0])])
    diagnostics = optimizer.diagnostics()
    assert set(diagnostics) == names
    assert all(type(value) is float for value in diagnostics.values())
    assert diagnostics["step_size"] == pytest.approx(0.1)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_diagnostics_reach_the_logs(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    x, y = regression_data()
    model = regression_model()
    model.compile(optimizer=NLCG(0.1), loss="mse")
    log = tmp_path / "log.csv"
    seen = []
    callbacks = [
        nlcg_tf.callbacks.OptimizerDiagnostics("batch"),
        keras.callbacks.CSVLogger(log),
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs)),
    ]
    history = model.fit(x, y, epochs=2, batch_size=16, verbose=0, callbacks=callbacks).history
    names = {"beta", "step_size", "learning_rate_scale", "cosine", "skipped_updates"}
    assert names <= set(history)
    assert names <= set(log.read_text().splitlines()[0].split(","))
    assert len(seen) == 8 and names <= set(seen[0])
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    assert history["cosine"][-1] == inner.diagnostics()["cosine"]


def test_diagnostics_refuse_another_optimizer():
    x, y = regression_data()
    model = regression_model()
    model.compile(optimizer="sgd", loss="mse")
    with pytest.raises(ValueError, match=r"diagnostics.*Received"):
        model.fit(x, y, verbose=0, callbacks=[nlcg_tf.callbacks.OptimizerDiagnostics()])


@pytest.mark.parametrize("fused", [False, "auto"])
def test_gradients_that_do_not_fit_are_refused(fused):
    v, other = keras.Variable([1.0, 2.0], name="v"), keras.Variable([1.0])

    def apply(gradients, variables):
        NLCG(0.1, "fletcher_reeves", fused=fused).apply(gradients, variables)

    bad = [
        ([tf.ones(2)], [v, other], "1 gradients of 2 variables"),
        ([tf.ones(1)], [v], r"'v' must have the shape \(2,\)"),
        ([tf.ones(())], [v], r"'v' must have the shape \(2,\)"),
        ([[1.0]], [v], r"'v' must have the shape \(2,\)"),
        ([tf.complex(tf.ones(2), tf.ones(2))], [v], "real numbers"),
        ([tf.ones(2)] * 2, [v, v.value], "given twice"),
    ]
    for gradients, variables, words in bad:
        with pytest.raises(ValueError, match=words):
            apply(gradients, variables)
    np.testing.assert_array_equal(v.numpy(), [1.0, 2.0])
    with pytest.raises(ValueError, match="updates variables"):
        NLCG().build([np.ones(2)])
