"""Optimizers whose gradients are averaged over Horovod's workers."""

import os

import tensorflow as tf
from horovod.tensorflow import allgather_object
from tensorflow.python.ops import control_flow_util

from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.horovod.collectives import average, name_of
from nlcg_tf.horovod.factors import share
from nlcg_tf.polar import shared_by


class Averaging(CountsUpdates):
    """Mixin for a Keras optimizer; see `DistributedOptimizer`."""

    def _clip_gradients(self, grads):
        # Keras comes here once an update, after accumulation and before clipping and the update.
        return super()._clip_gradients(self._reduce(grads, self))

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        self._compare(grads, trainable_variables)
        self._count_updates_without_average(self._without_average + 1)
        with shared_by(share):
            self._apply_with_average(grads, trainable_variables)
        # A graph is traced with all that any of its calls may do.
        most = (self.gradient_accumulation_steps or 1) if tf.executing_eagerly() else 1
        if self._without_average >= most:
            raise RuntimeError(
                f"{type(self).__name__} has updated its variables without averaging the gradients "
                "over the workers, which would train apart: its `apply` does not come to Keras' "
                "`_clip_gradients`, as that of an optimizer that hands its gradients to others. "
                "Distribute one that updates all variables itself."
            )

    def _apply_with_average(self, grads, trainable_variables):
        super().apply(grads, trainable_variables)

    def _count_updates_without_average(self, count):
        object.__setattr__(self, "_without_average", count)

    def _compare(self, grads, variables):
        """Refuses what would make the workers wait for each other for ever, in the first update.

        Elastic workers are not compared: one that joins has a first update of its own.
        """
        _check_context()
        if self._are_compared:
            return
        variables = self._trainable_variables if variables is None else list(variables)
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise ValueError(
                    f"Variable '{name_of(variable)}' is overwritten with its gradient, as the "
                    "scales of float8 are. Such gradients are not averaged, and the workers would "
                    "train apart. Use another precision with several workers."
                )
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            return
        own = [i for i, g in enumerate(grads) if g is not None]
        with tf.init_scope():  # what has a gradient is known while a graph is traced
            first, *others = allgather_object(own)
        for worker, found in enumerate(others, 1):
            if odd := sorted(set(first) ^ set(found)):
                has, lacks = (0, worker) if odd[0] in first else (worker, 0)
                name = name_of(variables[odd[0]]) if odd[0] < len(variables) else odd[0]
                raise ValueError(
                    f"Variable '{name}' has a gradient on worker {has} and none on worker {lacks} "
                    f"({len(odd)} such variables): they would wait for each other for ever."
                )
        object.__setattr__(self, "_are_compared", True)

    def _reduce(self, grads, optimizer):
        self._count_updates_without_average(0)
        dense = [tf.convert_to_tensor(g) for g in grads if g is not None]
        extra = self._averaged_scalars(optimizer)
        averages = average(
            [*(self._compress(g) for g in dense), *(tf.convert_to_tensor(x) for x in extra)]
        )
        for variable, x in zip(extra, averages[len(dense) :]):
            variable.assign(x)
        averages = iter([tf.cast(x, g.dtype) for x, g in zip(averages, dense)])
        return [None if g is None else next(averages) for g in grads]

    def _averaged_scalars(self, optimizer):
        # Only NLCG has a loss to average, and only where its settings need one.
        loss = getattr(optimizer, "update_loss", None)
        return [*self._average_with, *([] if loss is None else [loss])]

    def _compress(self, gradient):
        if self._wire_dtype is None or gradient.dtype != tf.float32:
            return gradient
        return tf.cast(gradient, self._wire_dtype)

    def __setattr__(self, name, value):
        if name == "loss_scale_factor" and value is None:
            raise ValueError(
                "Keras' LossScaleOptimizer cannot wrap a distributed optimizer: each worker would "
                "decide for itself which update to skip. Under mixed_float16 use "
                "`DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))`."
            )
        super().__setattr__(name, value)


class AveragingLossScale(Averaging):
    """Averages before the gradients are checked, so that all workers skip the same updates."""

    def _apply_with_average(self, grads, trainable_variables):
        super()._apply_with_average(self._reduce(grads, self.inner_optimizer), trainable_variables)


def _check_context():
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    ):
        raise RuntimeError(
            "Horovod's operations cannot be compiled by XLA. Use "
            "`model.compile(..., jit_compile=False)`, or compile the gradients alone."
        )
    if tf.distribute.has_strategy():
        raise RuntimeError(
            "Horovod cannot be combined with a tf.distribute strategy: start one Horovod "
            "worker for each device and leave the strategy out."
        )
