"""Two workers of which each keeps a part of the optimizer's state; run by run_checks.py."""

import tempfile

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from nlcg_tf.horovod.whole import gather_optimizer, scatter_optimizer
from tests.distributed.training import UPDATES, expect, make, shard_of
from tests.support.problems import (
    MeanSquares,
    flat,
    regression_data,
    regression_model,
    relative_difference,
)

# Each form of the update, and each argument of Keras' that sees whole variables; the sizes, 41
# weights in 4 variables, do not divide by two.
CASES = {
    "blended": {"fused": True},
    "fletcher_reeves": {"fused": True, "weight_decay": 0.01},
    "polak_ribiere": {"fused": True, "global_clipnorm": 0.5},
    "own": {"use_ema": True, "ema_momentum": 0.8, "gradient_accumulation_steps": 2},
    "none": {"fused": True, "preconditioner": None, "line_search": "step"},
    "blended, reference": {"fused": False},
    "fletcher_reeves, reference": {"fused": False, "weight_decay": 0.01},
    "spectral": {"fused": True, "weight_decay": 0.01},
    "spectral, reference": {"fused": False},
    "momentum": {"weight_decay": 0.01, "global_clipnorm": 0.5},
    "adamw": {"clipvalue": 0.05},
}


def optimizer_of(name, **arguments):
    name = name.partition(",")[0]
    if name == "spectral":
        return NLCG(0.05, "fletcher_reeves", "spectral", **arguments)
    if name == "own":
        return NLCG(0.05, preconditioner=MeanSquares(), **arguments)
    if name == "none":
        return NLCG(0.05, **arguments)
    if name == "adamw":
        return keras.optimizers.AdamW(0.01, **arguments)
    return make(name, **arguments)


def model_of(dtype):
    model = regression_model(units=8, dtype=dtype)
    model.layers[-1].bias.assign([0.1])
    return model


def train(model, optimizer, updates=UPDATES, graph=True):
    """Updates with this worker's half of each of two micro-batches, or of the batch twice."""
    x, y = regression_data(dtype=model.variables[0].dtype)
    x, y = np.split(x, 2), np.split(y, 2)

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            scaled = optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    step = tf.function(step) if graph else step
    for _ in range(updates // 2):
        for half_x, half_y in zip(x, y):
            for _ in range(optimizer.gradient_accumulation_steps or 1):
                step(shard_of(half_x), shard_of(half_y))
    return model


def distributed(name, shard, arguments):
    optimizer = optimizer_of(name, **arguments)
    if "weight_decay" in arguments:
        optimizer.exclude_from_weight_decay(var_names=["/bias"])  # the layer's name is before it
    return hvd.DistributedOptimizer(optimizer, shard=shard)


def check_sharded_updates_equal_those_of_whole_state():
    # To trace a graph takes as long as eight updates without one: a few stand for all.
    cases = {
        "float64": (1e-13, CASES, ["own", "blended"]),
        "float32": (1e-6, *2 * [["blended", "spectral"]]),
    }
    for dtype, (bound, names, in_graph) in cases.items():
        keras.config.set_floatx(dtype)
        for name in names:
            arguments = CASES[name]
            optimizers = [distributed(name, shard, arguments) for shard in (False, True)]
            graph = name in in_graph
            updates = UPDATES if graph else 6
            models = [train(model_of(dtype), one, updates, graph) for one in optimizers]
            states = [[*m.variables] for m in models]
            if "use_ema" in arguments:
                for state, optimizer in zip(states, optimizers):
                    state += optimizer._model_variables_moving_average
            difference = relative_difference(*(flat(state) for state in reversed(states)))
            # Of polar factors rounding grows by the gradients' condition, in every update.
            allowed = bound * (100 if name.startswith("spectral") else 1)
            assert difference < allowed, (dtype, name, difference)
            hvd.check_identical([*models[1].variables, *optimizers[1].variables])
            # Each worker has its part of each slot; they differ in size by one at most, unless
            # variables stay whole.
            own = [sum(v.shape[0] for v in optimizers[1].division.slots.values())]
            sizes = np.array(hvd.allgather_object(own)).ravel()
            slots = optimizers[1].division.slots
            kinds = len({slot for slot, _ in slots})
            assert sizes.sum() == kinds * 49, (name, sizes)
            if not name.startswith("spectral"):
                assert abs(np.diff(sizes)) <= len(slots)
    keras.config.set_floatx("float32")


def check_sharded_state_is_that_of_the_whole():
    """Gathered, it is the state of an optimizer that was never divided; scattered, it goes on."""
    keras.config.set_floatx("float64")
    for name in ("blended", "own", "adamw", "spectral"):
        arguments = CASES[name]
        plain = distributed(name, False, arguments)
        model = train(model_of("float64"), plain, 4, graph=False)
        sharded = distributed(name, True, arguments)
        divided = train(model_of("float64"), sharded, 4, graph=False)
        whole = gather_optimizer(sharded)
        assert (whole is None) == (hvd.rank() == 1)
        if whole is not None:
            assert [v.shape for v in whole.variables] == [v.shape for v in plain.variables]
            found, expected = (
                flat(v for v in o.variables if "observed" not in v.name) for o in (whole, plain)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        other = distributed(name, True, arguments)
        other.build(divided.trainable_variables)
        scatter_optimizer(other, whole)
        ends = [train(m, o, 4, graph=False) for m, o in ((divided, other), (model, plain))]
        relative = relative_difference(*(flat(end.weights) for end in ends))
        assert relative < 1e-13, (name, relative)
    keras.config.set_floatx("float32")


def check_a_saved_model_has_the_whole_state():
    """Saved by worker 0, it is loaded as a plain one, or by each worker as its own part."""
    folder = tempfile.mkdtemp() if hvd.rank() == 0 else None
    path = hvd.broadcast_object(folder) + "/model.keras"
    model = model_of("float32")
    model.compile(optimizer=distributed("blended", True, {}), loss="mse")
    train(model, model.optimizer, 4)
    expect(RuntimeError, "is sharded.*gathered", model.save, f"{path}.{hvd.rank()}.keras")
    checkpoint = tf.train.Checkpoint(optimizer=model.optimizer)
    expect(RuntimeError, "is sharded.*gather_optimizer", checkpoint.save, f"{path}.{hvd.rank()}")
    with hvd.gathered(model):
        if hvd.rank() == 0:
            model.save(path)
    hvd.allgather_object("saved")
    loaded = keras.models.load_model(path)
    assert type(loaded.optimizer) is NLCG
    other = model_of("float32")
    other.compile(optimizer=distributed("blended", True, {}), loss="mse")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    for key, part in model.optimizer.division.slots.items():
        np.testing.assert_array_equal(other.optimizer.division.slots[key], part)
    if hvd.rank() == 1:
        other.optimizer.iterations.assign(0)
    callback = hvd.BroadcastVariables()
    callback.set_model(other)
    expect(ValueError, "worker 0: 4, worker 1: 0.*every worker", callback.on_train_begin)
    other.optimizer.iterations.assign(4)
    callback.on_train_begin()
    ends = [
        flat(train(m, o, 4).weights)
        for m, o in ((model, model.optimizer), (other, other.optimizer))
    ]
    np.testing.assert_array_equal(*ends)
    plain = hvd.DistributedOptimizer(loaded.optimizer)
    difference = relative_difference(flat(train(loaded, plain, 4).weights), ends[0])
    assert difference < 1e-6, difference


def check_elastic_workers_divide_the_kept_state():
    for name in ("blended", "spectral"):
        divides_the_kept_state(name)


def divides_the_kept_state(name):
    model, optimizer = model_of("float32"), distributed(name, True, {})
    train(model, optimizer, 4)
    variables = [*model.variables, *optimizer.variables]
    state = hvd.ElasticState(variables, update=4)

    def check_kept(kept):
        for value, variable in zip(kept, variables, strict=True):
            np.testing.assert_array_equal(value, variable)

    trained = [np.array(v) for v in variables]
    state.sync()
    check_kept(trained)
    train(model, optimizer, 4)
    state.save()
    kept = [np.array(v) for v in variables]
    train(model, optimizer, 4)
    # A worker is lost, and after that one joins that knows nothing.
    state.restore()
    state.reset()
    if hvd.rank() == 1:
        state._whole, state._is_divided_anew = None, False
    state.sync()
    check_kept(kept)
    # Without a loss and without a commit the workers go on from where they are.
    state.save()
    train(model, optimizer, 4)
    trained = [np.array(v) for v in variables]
    state.sync()
    check_kept(trained)
    # Before its first synchronisation a worker has the state that an optimizer begins with.
    state._whole = None
    state.reset()
    for diagonal in optimizer.slots.get("hessian_diagonal", [])[:1]:
        assert {float(v) for v in np.ravel(diagonal)} == {1.0}
    assert not np.any(optimizer.slots["direction"][0])
    state.sync()
    train(model, optimizer, 4)
    hvd.check_identical([*model.variables, *optimizer.variables])


def check_sharded_gradients_can_be_compressed():
    exact = flat(train(model_of("float32"), distributed("momentum", True, {})).weights)
    for compression, bound in (("fp16", 0.002), ("bf16", 0.02)):
        optimizer = hvd.DistributedOptimizer(optimizer_of("momentum"), compression, shard=True)
        model = train(model_of("float32"), optimizer)
        difference = relative_difference(flat(model.weights), exact)
        assert 0 < difference < bound, (compression, difference)
        hvd.check_identical(model.variables)


def check_sharded_workers_skip_an_overflow_together():
    model = model_of("float32")
    inner = NLCG(0.05)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(optimizer, shard=True)
    before = flat(model.weights)
    for rank, is_skipped in ((1, True), (None, False)):
        inner.observe_loss(tf.constant(1.0))
        value = np.inf if rank == hvd.rank() else 1.0
        gradients = [tf.fill(v.shape, value) for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        assert (flat(model.weights) == before).all() == is_skipped
        hvd.check_identical([*model.variables, *optimizer.variables])
    assert int(inner.iterations) == 1
    # The file of the plain one has the scale and the slots of all.
    model.optimizer = optimizer
    path = tempfile.mkdtemp() + "/model.weights.h5"  # of each worker
    expect(RuntimeError, "is sharded", model.save_weights, path)
    with hvd.gathered(model):
        if hvd.rank() == 0:
            model.optimizer.save_own_variables(store := {})
        store = hvd.broadcast_object(store if hvd.rank() == 0 else None)
    before = {key: np.array(part) for key, part in inner.division.slots.items()}
    assert float(optimizer.dynamic_scale) == 4.0
    optimizer.dynamic_scale.assign(16.0)
    for part in inner.division.slots.values():
        part.assign(part + 1)
    optimizer.load_own_variables(store)
    assert float(optimizer.dynamic_scale) == 4.0
    for key, part in inner.division.slots.items():
        np.testing.assert_array_equal(before[key], part)
    optimizer.dynamic_scale.assign(16.0)
    optimizer.load_own_variables({})  # Keras warns that there is nothing
    assert float(optimizer.dynamic_scale) == 16.0 and int(inner.iterations) == 1


@keras.saving.register_keras_serializable(package="tests")
class KeepsPositions(MeanSquares):
    """Its first state differs from element to element."""

    def initial_state(self, shape):
        return {"hessian_diagonal": (shape, np.arange(float(np.prod(shape))).reshape(shape))}


def check_first_states_are_those_of_whole_variables():
    model = model_of("float32")
    optimizer = hvd.DistributedOptimizer(NLCG(preconditioner=KeepsPositions()), shard=True)
    optimizer.build(model.trainable_variables)
    whole = gather_optimizer(optimizer)
    if hvd.rank() == 0:
        for slot in whole.slots["hessian_diagonal"]:
            np.testing.assert_array_equal(np.ravel(slot.numpy()), np.arange(slot.numpy().size))


def check_bfloat16_variables_can_be_sharded():
    values = []
    for is_sharded in (False, True):
        variables = [keras.Variable(np.ones(shape), dtype="bfloat16") for shape in ((5,), (2, 3))]
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer = hvd.DistributedOptimizer(optimizer, shard=is_sharded)
        optimizer.build(variables)
        for _ in range(3):
            optimizer.apply([tf.cast(tf.fill(v.shape, 0.5), "bfloat16") for v in variables])
        values.append(np.concatenate([np.ravel(v.numpy()) for v in variables]))
    np.testing.assert_array_equal(*values)
    scatter_optimizer(optimizer, gather_optimizer(optimizer))
