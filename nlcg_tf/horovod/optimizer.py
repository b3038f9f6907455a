"""Makes any Keras 3 optimizer average its gradients over Horovod's workers."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from horovod.tensorflow import allgather_object
from tensorflow.python.ops import control_flow_util

from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.horovod.collectives import average, name_of

COMPRESSIONS = {None: None, "fp16": tf.float16, "bf16": tf.bfloat16}


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    compression: str | None = None,
    average_with: Sequence[Any] = (),
) -> keras.optimizers.Optimizer:
    """Makes a Keras 3 optimizer average its gradients over all Horovod workers.

    The gradients, and with them the loss that NLCG's line search observes, are averaged in one
    grouped all-reduce for each update, before they are clipped. Under
    `gradient_accumulation_steps` that is once for each virtual batch: micro-steps communicate
    nothing. The class of `optimizer` is exchanged in place; saved models load as the plain class.

    Args:
        optimizer: a `keras.optimizers.Optimizer`. With dynamic loss scaling, wrap outside:
            `DistributedOptimizer(LossScaleOptimizer(optimizer))`.
        compression: `None`; `"fp16"` or `"bf16"` to send float32 gradients as float16, or as
            bfloat16, which has the range of float32 and less precision.
        average_with: scalar variables to be averaged in the same round, such as a loss to log.

    Returns:
        `optimizer`.

    Raises:
        ValueError: for another argument, an optimizer that is distributed already, or a
            combination that would let the workers train apart.
        RuntimeError: by a training step compiled by XLA, which has no Horovod kernels.
        ValueError: by the first training step, on all workers, if a variable has a gradient on some
            of them only.
    """
    _check(optimizer, compression)
    base = _DistributedLossScale if hasattr(optimizer, "inner_optimizer") else _Distributed
    cls = type(optimizer)
    # Keras writes `optimizer.__class__` into a saved model: there it must find the plain class.
    members = {"__class__": property(lambda self: cls), "__doc__": cls.__doc__}
    optimizer.__class__ = type(f"Distributed{cls.__name__}", (base, cls), members)
    object.__setattr__(optimizer, "_wire_dtype", COMPRESSIONS[compression])
    object.__setattr__(optimizer, "_average_with", tuple(average_with))
    object.__setattr__(optimizer, "_are_compared", False)
    return optimizer


def _check(optimizer, compression):
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`optimizer` must be a Keras 3 optimizer. Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, _Distributed):
        raise ValueError(f"`optimizer` is distributed already. Received: optimizer={optimizer!r}")
    if hasattr(optimizer, "_allreduce_grads"):
        raise ValueError(
            "`optimizer` is wrapped by Horovod's own DistributedOptimizer, which does not work "
            "with Keras 3 and would accumulate and sum gradients a second time. Pass the plain "
            f"optimizer. Received: optimizer={optimizer!r}"
        )
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"`compression` must be None, 'fp16' or 'bf16'. Received: compression={compression!r}"
        )
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner and (isinstance(inner, _Distributed) or inner.gradient_accumulation_steps):
        raise ValueError(
            "`optimizer` wraps an optimizer that is distributed already or accumulates gradients; "
            "workers could disagree on which update to skip. Wrap a LossScaleOptimizer around a "
            "plain optimizer, without `gradient_accumulation_steps`. Received: "
            f"inner_optimizer={inner!r}"
        )


class _Distributed(CountsUpdates):
    def _clip_gradients(self, grads):
        # Keras comes here once an update, after accumulation and before clipping and the update.
        return super()._clip_gradients(self._reduce(grads, self))

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        self._compare(grads, trainable_variables)
        super().apply(grads, trainable_variables)

    def _compare(self, grads, variables):
        """Refuses what would make the workers wait for each other for ever, in the first update.

        Elastic workers are not compared: one that joins has a first update of its own.
        """
        _check_context()
        if self._are_compared or os.environ.get("HOROVOD_ELASTIC") == "1":
            return
        variables = self._trainable_variables if variables is None else list(variables)
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
        dense = [tf.convert_to_tensor(g) for g in grads if g is not None]
        # Only NLCG has a loss to average, and only where its settings need one.
        loss = getattr(optimizer, "update_loss", None)
        extra = [*self._average_with, *([] if loss is None else [loss])]
        averages = average(
            [*(self._compress(g) for g in dense), *(tf.convert_to_tensor(x) for x in extra)]
        )
        for variable, x in zip(extra, averages[len(dense) :]):
            variable.assign(x)
        averages = iter([tf.cast(x, g.dtype) for x, g in zip(averages, dense)])
        return [None if g is None else next(averages) for g in grads]

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


class _DistributedLossScale(_Distributed):
    """Averages before the gradients are checked, so that all workers skip the same updates."""

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        self._compare(grads, trainable_variables)
        super().apply(self._reduce(grads, self.inner_optimizer), trainable_variables)


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
