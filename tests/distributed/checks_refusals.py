"""What two workers refuse, most of it with sharding; run by run_checks.py."""

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd
from nlcg_tf import NLCG
from nlcg_tf.horovod.whole import gather_optimizer
from nlcg_tf.preconditioner import Preconditioner
from tests.distributed.checks_sharding import model_of
from tests.distributed.training import BATCH, expect
from tests.support.problems import regression_data, regression_model


def check_what_is_refused():
    x, y = regression_data(BATCH)
    distributed = hvd.DistributedOptimizer(NLCG(0.1))
    expect(ValueError, "distributed already", hvd.DistributedOptimizer, distributed)
    expect(ValueError, "Keras 3 optimizer.*'adam'", hvd.DistributedOptimizer, "adam")
    expect(ValueError, "compression='zip'", hvd.DistributedOptimizer, NLCG(0.1), "zip")
    for wrong in ("loss", [1.0], [tf.Variable(1)], [tf.Variable([1.0, 2.0])]):
        averaged = {"average_with": wrong}
        expect(ValueError, "`average_with` must", hvd.DistributedOptimizer, NLCG(0.1), **averaged)
    for wrong in (0, -1, "5", float("nan"), None):
        expect(ValueError, "`seconds` must be a number.*seconds=", hvd.Watch, wrong)
        expect(ValueError, "`seconds` must be a number.*seconds=", hvd.WatchWorkers, wrong)
    for wrong in (2, -1, "0", None):
        words = f"`root_rank` must be the rank of a worker, 0 to 1. Received: root_rank={wrong!r}"
        expect(ValueError, words, hvd.broadcast, [tf.Variable(1.0)], wrong)
        expect(ValueError, words, hvd.broadcast_object, 1, wrong)
        callback = hvd.BroadcastVariables(wrong)
        expect(ValueError, words, callback.on_train_begin)
    import horovod.tensorflow.keras

    wrapped = horovod.tensorflow.keras.DistributedOptimizer(keras.optimizers.SGD(0.1))
    expect(ValueError, "Horovod's own DistributedOptimizer", hvd.DistributedOptimizer, wrapped)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        variable, sgd = keras.Variable([1.0]), hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        expect(RuntimeError, "tf.distribute", sgd.apply, [tf.constant([1.0])], [variable])
    scaled = keras.optimizers.LossScaleOptimizer
    expect(ValueError, r"DistributedOptimizer\(keras.optimizers.LossScale", scaled, distributed)
    accumulating = scaled(NLCG(0.1, gradient_accumulation_steps=2))
    expect(ValueError, "gradient_accumulation_steps", hvd.DistributedOptimizer, accumulating)
    model = regression_model()
    model.compile(optimizer=distributed, loss="mse", jit_compile=True)
    expect(RuntimeError, "jit_compile=False", lambda: model.fit(x, y, verbose=0))


def check_a_loss_that_one_worker_observes_is_an_error_on_all():
    for shard in (False, True):
        model = model_of("float32")
        variables = model.trainable_variables
        optimizer = hvd.DistributedOptimizer(NLCG(0.1), shard=shard)
        gradients = [tf.ones(v.shape) for v in variables]
        for update in range(3):
            if update != 1 or hvd.rank() == 0:
                optimizer.observe_loss(1.0)
            if update == 1:
                message = "`observed loss`: .*known.* on worker 0, .*not observed.* on worker 1"
                expect(ValueError, message, optimizer.apply, gradients, variables)
            else:
                optimizer.apply(gradients, variables)


def check_what_cannot_be_sharded_is_refused():
    def shard(optimizer, **arguments):
        return hvd.DistributedOptimizer(optimizer, shard=True, **arguments)

    expect(ValueError, "`clipnorm` needs whole variables", shard, NLCG(clipnorm=1.0))
    expect(ValueError, "`lars_coefficient`.*0.1", shard, NLCG(lars_coefficient=0.1))
    expect(ValueError, "Lamb is not known to update each", shard, keras.optimizers.Lamb(0.1))
    expect(ValueError, "cannot be made again from its conf", shard, keras.optimizers.SGD(lambda: 1))
    scaled = keras.optimizers.LossScaleOptimizer(NLCG())
    expect(ValueError, "use compression='bf16'", hvd.DistributedOptimizer, scaled, "fp16", (), True)
    expect(ValueError, "`average_with` must be.*3", shard, NLCG(), average_with=3)
    expect(ValueError, "`compression` must be", shard, NLCG(), compression=["fp16"])
    expect(ValueError, "`shard` must be", hvd.DistributedOptimizer, NLCG(), None, (), "yes")
    expect(ValueError, "Coupled.*couples='model'", shard, NLCG(preconditioner=Coupled()))
    keeping = shard(NLCG(preconditioner=KeepsForVectors()))
    variables = model_of("float32").trainable_variables
    expect(ValueError, "KeepsForVectors.*couples='variable'", keeping.build, variables)
    optimizer, model = shard(keras.optimizers.SGD(0.1)), model_of("float32")
    variables = model.trainable_variables
    gradients = [tf.ones(v.shape) for v in variables]
    optimizer.apply(gradients, variables)
    own = [tf.ones(v.shape) for v in variables]
    if hvd.rank() == 1:
        own[0] = None
    odd = shard(keras.optimizers.SGD(0.1))
    expect(ValueError, "worker 0 and none on worker 1", odd.apply, own, variables)
    expect(ValueError, "has none. Freeze", optimizer.apply, [None, *gradients[1:]], variables)
    expect(ValueError, "1 of 4 variables", optimizer.apply, gradients[:1], variables[:1])
    unbuilt = shard(keras.optimizers.SGD(0.1))
    expect(ValueError, "without `variables`", unbuilt.apply, gradients)
    twice = [variables[0], *variables[:3]]
    expect(ValueError, "is given twice", optimizer.apply, gradients, twice)
    expect(ValueError, "is given twice", shard(keras.optimizers.SGD(0.1)).build, twice)
    # In whatever order they come.
    model.set_weights([np.zeros(v.shape) for v in variables])
    gradients = [tf.fill(v.shape, float(i)) for i, v in enumerate(variables)]
    optimizer.apply(gradients[::-1], variables[::-1])
    for i, variable in enumerate(variables):
        np.testing.assert_allclose(variable.numpy(), -0.1 * i, rtol=1e-6)
    optimizer.apply([0 * g for g in gradients])  # of all variables
    expect(ValueError, "built already", shard, plain_built())
    expect(ValueError, "before a sharded", optimizer.exclude_from_weight_decay, None, ["bias"])
    for name in ("clipnorm", "lars_coefficient"):
        message = f"`{name}` needs whole variables.*0.1"
        expect(ValueError, message, setattr, optimizer, name, 0.1)
    turned = [tf.transpose(gradients[0]), *gradients[1:]]
    message = r"must have the shape \(4, 8\).*\(8, 4\)"
    expect(ValueError, message, optimizer.apply, turned, variables)
    apart = shard(NLCG(fused=hvd.rank() == 0))
    apart.build(variables)
    expect(
        ValueError,
        "`fused`: .the fused op. on worker 0, .the reference update. on worker 1",
        apart.apply,
        gradients,
        variables,
    )


def check_classes_whose_shards_would_train_otherwise_are_refused():
    """Each would train with other weights than unsharded, or could not be saved."""
    expected = {
        Subclass: "Subclass is not known to update each",
        OwnApply: "OwnApply has an `apply`",
        OwnClipping: "OwnClipping has an `apply` or `_clip_gradients`",
    }
    for cls, message in expected.items():
        expect(ValueError, message, hvd.DistributedOptimizer, cls(0.1), shard=True)
    expected = {
        OddVariables: "made by `add_variable_from_reference`, which 'odd' of",
        Twice: "Twice with 2 of the name None for 1 shards",
        Clash: "Clash with 1 of the name 'average'",
        PastTheMixin: "calls `super\\(\\).build`",
    }
    for cls, message in expected.items():
        optimizer = hvd.DistributedOptimizer(cls(0.1, use_ema=True), shard=True)
        expect(ValueError, message, optimizer.build, model_of("float32").trainable_variables)
    optimizer = hvd.DistributedOptimizer(ScalarForEach(0.1), shard=True)
    optimizer.build(model_of("float32").trainable_variables)
    message = "must not depend on the number of its variables"
    expect((ValueError, RuntimeError), message, gather_optimizer, optimizer)


class Subclass(keras.optimizers.SGD):
    pass


class Elementwise(keras.optimizers.SGD):
    is_elementwise = True


class OwnApply(Elementwise):
    def apply(self, grads, trainable_variables=None):
        super().apply([tf.sign(g) for g in grads], trainable_variables)


class OwnClipping(Elementwise):
    def _clip_gradients(self, grads):
        return [tf.sign(g) for g in super()._clip_gradients(grads)]


class OddVariables(Elementwise):
    def build(self, variables):
        super().build(variables)
        self.odd = [self.add_variable(v.shape, name="odd") for v in variables]


class Twice(Elementwise):
    def build(self, variables):
        super().build(variables)
        for v in [*variables, *variables]:
            self.add_variable_from_reference(v)


class Clash(Elementwise):
    def build(self, variables):
        super().build(variables)
        self.own = [self.add_variable_from_reference(v, "average") for v in variables]


class PastTheMixin(Elementwise):
    def build(self, variables):
        keras.optimizers.Optimizer.build(self, variables)


class ScalarForEach(Elementwise):
    def build(self, variables):
        super().build(variables)
        self.scalars = [self.add_variable((), name="scalar") for _ in variables]


@keras.saving.register_keras_serializable(package="tests")
class KeepsForVectors(Preconditioner):
    """Shards of whole variables have no place for this state."""

    couples = "variable"

    def initial_state(self, shape):
        return {"lengths": ((1,), 0.0)} if len(shape) == 1 else {}


class Coupled(Preconditioner):
    couples = "model"


def plain_built():
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model_of("float32").trainable_variables)
    return optimizer
