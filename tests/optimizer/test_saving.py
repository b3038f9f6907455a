"""Restored training goes on bit for bit; a state that does not fit is an error."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import nlcg_tf
from nlcg_tf import NLCG
from nlcg_tf.line_search import OnlineLineSearch
from nlcg_tf.preconditioner import DiagonalBFGS, NormalizedBFGS, Spectral
from tests.support.problems import MeanSquares, paper_nlcg, regression_data, regression_model

BATCH = 16

SETTINGS = [
    {},
    {"update_rule": "polak_ribiere", "line_search": "step"},
    {"line_search": None, "preconditioner": None},
    {"lars_coefficient": 0.1, "line_search": OnlineLineSearch(0.05, 0.01)},
    {"gradient_accumulation_steps": 3, "use_ema": True, "ema_overwrite_frequency": 2},
    {"learning_rate": nlcg_tf.schedules.CifarSchedule(128, 2, 8)},
    {"preconditioner": NormalizedBFGS(0.9), "nesterov": True, "update_rule": "blended"},
    {"preconditioner": None, "momentum": 0.8, "update_rule": "blended"},
]
IDS = [",".join(settings) or "default" for settings in SETTINGS]


def compiled_model(settings, **arguments):
    model = regression_model()
    optimizer = paper_nlcg(**{"learning_rate": 0.1, **settings})
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    # TensorFlow's graph optimizer may round a function otherwise that had to be traced twice,
    # because its first call made the slots. A restored optimizer has them before the first call.
    model.optimizer.build(model.trainable_variables)
    return model


def train(model, first, last):
    """Updates (or micro-steps) `first` to `last` on consecutive batches."""
    x, y = regression_data(128)
    for t in range(first, last):
        rows = np.arange(t * BATCH, (t + 1) * BATCH) % len(x)
        model.train_on_batch(x[rows], y[rows])


def bits(model):
    variables = [*model.variables, *model.optimizer.variables]
    return {v.path: np.asarray(v).tobytes() for v in variables}


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_training_goes_on_bit_for_bit(settings, tmp_path):
    """From a Keras file and a checkpoint, after 7 of 12 steps: amid a virtual batch of 3."""
    straight = compiled_model(settings)
    train(straight, 0, 12)

    first = compiled_model(settings)
    train(first, 0, 7)
    first.save(tmp_path / "model.keras")
    state = tf.train.Checkpoint(model=first, optimizer=first.optimizer)
    path = state.write(str(tmp_path / "state"))
    loaded, restored = keras.models.load_model(tmp_path / "model.keras"), compiled_model(settings)
    status = tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(path)
    status.assert_consumed()
    for second in (loaded, restored):
        train(second, 7, 12)
        assert list(bits(second).values()) == list(bits(straight).values())
        assert second.optimizer.diagnostics() == straight.optimizer.diagnostics()


def test_get_config_holds_every_argument():
    arguments = {
        "learning_rate": 0.2,
        "update_rule": "blended",
        "preconditioner": NormalizedBFGS(0.95),
        "line_search": OnlineLineSearch(decrease_threshold=0.5),
        "nesterov": True,
        "momentum": 0.8,
        "epsilon": 1e-6,
        "lars_coefficient": 0.01,
        "fused": False,
        "name": "mine",
        "clipnorm": 1.0,
        "weight_decay": 0.1,
    }
    optimizer = NLCG(**arguments)
    copy = NLCG.from_config(optimizer.get_config())
    assert copy.get_config() == optimizer.get_config()
    for name in set(arguments) - {"learning_rate"}:
        assert getattr(copy, name) == arguments[name], name


@pytest.mark.parametrize(
    "preconditioner", [DiagonalBFGS(), NormalizedBFGS(0.9), Spectral(0.1), None]
)
def test_a_preconditioner_survives_serialisation(preconditioner):
    config = NLCG(preconditioner=preconditioner).get_config()
    assert keras.saving.deserialize_keras_object(config["preconditioner"]) == preconditioner
    assert NLCG.from_config(config).preconditioner == preconditioner


def test_from_config_takes_classes_of_the_users_own():
    class Mine(OnlineLineSearch):
        pass

    class Half(NormalizedBFGS):
        pass

    config = NLCG(preconditioner=Half(0.5), line_search=Mine(0.5)).get_config()
    before = str(config)
    copy = NLCG.from_config(config, custom_objects={"Mine": Mine, "Half": Half})
    assert copy.line_search == Mine(0.5) and type(copy.line_search) is Mine
    assert type(copy.preconditioner) is Half and str(config) == before


@pytest.mark.parametrize(
    "saved, wanted, words",
    [
        ({}, {"line_search": None}, "line_search: saved 'OnlineLineSearch', wanted 'NoneType'"),
        ({}, {"preconditioner": None}, "preconditioner: saved 'DiagonalBFGS', wanted 'NoneType'"),
        # As many variables of the same shapes: Keras would load one for the other.
        (
            {"preconditioner": MeanSquares()},
            {"preconditioner": None, "use_ema": True},
            "saved 'MeanSquares'",
        ),
        (
            {"preconditioner": "normalized_bfgs"},
            {"preconditioner": "bfgs"},
            "preconditioner: saved 'NormalizedBFGS', wanted 'DiagonalBFGS'",
        ),
        # The loss in one and the rate in the other are both a scalar at the same place.
        (
            {"line_search": "online", "learning_rate": nlcg_tf.schedules.CifarSchedule(128, 2, 8)},
            {"line_search": None},
            "learning_rate: saved 'a schedule or function', wanted 'a number'",
        ),
    ],
)
def test_a_saved_state_of_other_settings_is_an_error(saved, wanted, words, tmp_path):
    base = {"preconditioner": "bfgs", "update_rule": "fletcher_reeves"}
    model = compiled_model(base | saved, run_eagerly=True)
    train(model, 0, 2)
    model.save_weights(tmp_path / "model.weights.h5")

    stranger = compiled_model(base | wanted, run_eagerly=True)
    train(stranger, 0, 1)
    store = {}
    model.optimizer.save_own_variables(store)
    before = bits(stranger)
    with pytest.raises(ValueError, match=f"saved state of optimizer 'nlcg'.*{words}"):
        stranger.optimizer.load_own_variables(store)
    with pytest.raises(ValueError, match="saved state"):
        stranger.load_weights(tmp_path / "model.weights.h5")
    assert {k: v for k, v in bits(stranger).items() if "nlcg" in k} == {
        k: v for k, v in before.items() if "nlcg" in k
    }


def test_a_saved_state_without_its_settings_is_an_error():
    model = compiled_model({}, run_eagerly=True)
    train(model, 0, 2)
    store = {str(i): v.numpy() for i, v in enumerate(model.optimizer.variables)}
    with pytest.raises(ValueError, match="older version"):
        model.optimizer.load_own_variables(store)


def test_a_state_without_slots_of_other_settings_is_an_error():
    store, other = {}, NLCG(0.1, "momentum")
    NLCG(nlcg_tf.schedules.CifarSchedule(128, 2, 8)).save_own_variables(store)
    with pytest.raises(ValueError, match="uses_loss: saved True, wanted False; learning_rate: "):
        other.load_own_variables(store)
    assert other.learning_rate == 0.1


@pytest.mark.parametrize("how", ["custom_objects", "scope"])
def test_a_schedule_of_the_users_own_is_loaded(how, tmp_path):
    class Constant(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1

        def get_config(self):
            return {}

    model = compiled_model({"learning_rate": Constant()})
    train(model, 0, 1)
    model.save(tmp_path / "model.keras")
    mine = {"Constant": Constant}
    if how == "scope":
        with keras.saving.custom_object_scope(mine):
            loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=mine)
    assert list(bits(loaded).values()) == list(bits(model).values())


@pytest.mark.parametrize("wanted", [{"line_search": None}, {"preconditioner": None}])
def test_a_checkpoint_of_other_settings_is_not_consumed(wanted, tmp_path):
    model = compiled_model({}, run_eagerly=True)
    train(model, 0, 2)
    path = tf.train.Checkpoint(optimizer=model.optimizer).write(str(tmp_path / "state"))
    stranger = compiled_model(wanted, run_eagerly=True)
    train(stranger, 0, 1)
    with pytest.raises((AssertionError, ValueError, tf.errors.InvalidArgumentError)):
        tf.train.Checkpoint(optimizer=stranger.optimizer).read(path).assert_consumed()


def test_weights_can_be_loaded_where_there_is_no_optimizer_state(tmp_path):
    """An untrained model, weights of a model without optimizer, a model not trained yet."""
    for rate in (0.1, nlcg_tf.schedules.CifarSchedule(128, 2, 8)):
        untrained = regression_model()
        untrained.compile(optimizer=NLCG(rate), loss="mse")
        untrained.save(tmp_path / "untrained.keras")
        loaded = keras.models.load_model(tmp_path / "untrained.keras")
        train(loaded, 0, 2)

    plain = regression_model(seed=5)
    plain.save_weights(tmp_path / "plain.weights.h5")
    loaded.load_weights(tmp_path / "plain.weights.h5")
    for expected, actual in zip(plain.get_weights(), loaded.get_weights()):
        np.testing.assert_array_equal(expected, actual)

    loaded.save_weights(tmp_path / "trained.weights.h5")
    fresh = regression_model()
    fresh.compile(optimizer=NLCG(0.1), loss="mse")
    fresh.load_weights(tmp_path / "trained.weights.h5")
    for expected, actual in zip(plain.get_weights(), fresh.get_weights()):
        np.testing.assert_array_equal(expected, actual)


def test_a_saved_state_of_other_shapes_is_an_error(tmp_path):
    model = compiled_model({}, run_eagerly=True)
    train(model, 0, 2)
    stranger = keras.Sequential([keras.Input((4,)), keras.layers.Dense(9), keras.layers.Dense(1)])
    stranger.compile(optimizer=paper_nlcg(0.1), loss="mse", run_eagerly=True)
    train(stranger, 0, 1)
    store = {}
    model.optimizer.save_own_variables(store)
    before = bits(stranger)
    with pytest.raises(ValueError, match=r"shape of '.*': saved .*, wanted"):
        stranger.optimizer.load_own_variables(store)
    assert bits(stranger) == before


def test_a_strangers_state_of_as_many_variables_is_an_error():
    """SGD has two before the first update as after it; a shape that does not fit; one missing."""
    model, sgd = regression_model(), keras.optimizers.SGD(0.5)
    model.compile(optimizer=NLCG(0.1, "momentum", None), loss="mse", run_eagerly=True)
    train(model, 0, 2)
    sgd.build(model.trainable_variables)
    stores = [{}, {}, {}]
    sgd.save_own_variables(stores[0])
    for store in stores[1:]:
        NLCG(0.1, "momentum", None).save_own_variables(store)
    stores[1]["1"] = np.ones(2, "float32")
    stores[2]["2"] = stores[2].pop("1")
    before = bits(model)
    for store, words in zip(stores, ["another optimizer's", r"saved \(2,\)", "saved None"]):
        with pytest.raises(ValueError, match=f"saved state of optimizer 'nlcg'.*{words}"):
            model.optimizer.load_own_variables(store)
    assert bits(model) == before


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_a_state_from_before_the_first_update_starts_anew(settings):
    """What a trained optimizer has learnt of other weights must not stay; amid a virtual batch."""
    model, store = compiled_model(settings), {}
    first = [np.asarray(v) for v in model.variables]
    paper_nlcg(**{"learning_rate": 0.1, **settings}).save_own_variables(store)
    train(model, 0, 7)
    expected = bits(model)
    model.optimizer.load_own_variables(store)
    for variable, value in zip(model.variables, first):
        variable.assign(value)
    train(model, 0, 7)
    assert bits(model) == expected
