"""Keras 3 on Horovod: the layer that Horovod's own Keras module no longer provides.

Horovod's `DistributedOptimizer` and callbacks call methods that Keras 3 removed, so its workers
would train apart without an error. Here only Horovod's low-level ops are used.
"""

import hashlib

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from nlcg_tf.accumulation import CountsUpdates

try:
    import horovod.tensorflow as hvd
    from horovod.tensorflow import init, local_rank, local_size, rank, size
except ImportError as error:
    raise ImportError(
        "nlcg_tf.horovod needs Horovod built for this TensorFlow "
        f"(scripts/setup.sh builds it). The import failed with: {error}"
    ) from error

__all__ = [
    "AverageMovingStatistics",
    "BroadcastVariables",
    "DistributedOptimizer",
    "average_moving_statistics",
    "broadcast",
    "check_identical",
    "init",
    "local_rank",
    "local_size",
    "rank",
    "size",
    "sum_over_workers",
]

COMPRESSIONS = {None: None, "fp16": tf.float16}


def DistributedOptimizer(optimizer, compression=None):
    """Makes a Keras 3 optimizer average its gradients over all Horovod workers.

    The gradients, and with them the loss that NLCG's line search observes, are averaged in one
    grouped all-reduce for each update, before they are clipped. Under
    `gradient_accumulation_steps` that is once for each virtual batch: micro-steps communicate
    nothing. The class of `optimizer` is exchanged in place; saved models load as the plain class.

    Args:
        optimizer: a `keras.optimizers.Optimizer`. With dynamic loss scaling, wrap outside:
            `DistributedOptimizer(LossScaleOptimizer(optimizer))`.
        compression: `None`, or `"fp16"` to send float32 gradients as float16.

    Returns:
        `optimizer`.

    Raises:
        ValueError: for another argument, an optimizer that is distributed already, or a
            combination that would let the workers train apart.
        RuntimeError: by a training step compiled by XLA, which has no Horovod kernels.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`optimizer` must be a Keras 3 optimizer. Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, _Distributed):
        raise ValueError(f"`optimizer` is distributed already. Received: optimizer={optimizer!r}")
    if compression not in COMPRESSIONS:
        raise ValueError(
            f"`compression` must be None or 'fp16'. Received: compression={compression!r}"
        )
    base = _Distributed
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        base = _DistributedLossScale
        if isinstance(inner, _Distributed) or inner.gradient_accumulation_steps:
            raise ValueError(
                "`optimizer` wraps an optimizer that is distributed already or accumulates "
                "gradients; workers could disagree on which update to skip. Wrap a "
                "LossScaleOptimizer around a plain optimizer, without "
                f"`gradient_accumulation_steps`. Received: inner_optimizer={inner!r}"
            )
    cls = type(optimizer)
    # Keras writes `optimizer.__class__` into a saved model: there it must find the plain class.
    members = {"__class__": property(lambda self: cls), "__doc__": cls.__doc__}
    optimizer.__class__ = type(f"Distributed{cls.__name__}", (base, cls), members)
    object.__setattr__(optimizer, "_wire_dtype", COMPRESSIONS[compression])
    return optimizer


class _Distributed(CountsUpdates):
    def _clip_gradients(self, grads):
        # Keras comes here once an update, after accumulation and before clipping and the update.
        return super()._clip_gradients(self._reduce(grads, self))

    def _reduce(self, grads, optimizer):
        if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        ):
            raise RuntimeError(
                "Horovod's operations cannot be compiled by XLA. Use "
                "`model.compile(..., jit_compile=False)`, or compile the gradients alone."
            )
        dense = [tf.convert_to_tensor(g) for g in grads if g is not None]
        # Only NLCG has a loss to average, and only with a line search.
        loss = getattr(optimizer, "observed_loss", None)
        extra = [] if loss is None else [tf.convert_to_tensor(loss)]
        averages = _average([*(self._compress(g) for g in dense), *extra])
        if loss is not None:
            loss.assign(averages.pop())
        averages = iter([tf.cast(x, g.dtype) for x, g in zip(averages, dense)])
        return [None if g is None else next(averages) for g in grads]

    def _compress(self, gradient):
        if gradient.dtype == tf.bfloat16:  # which Horovod's operations do not know
            return tf.cast(gradient, tf.float32)
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
        super().apply(self._reduce(grads, self.inner_optimizer), trainable_variables)


def _average(tensors):
    """Averages over the workers: one grouped all-reduce, or one for each type of number."""
    averages = list(tensors)
    for dtype in {x.dtype: None for x in tensors}:
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        group = [tensors[i] for i in places]
        reduced = hvd.grouped_allreduce(group, op=hvd.Average, name=f"average_{dtype.name}")
        for i, x in zip(places, reduced):
            averages[i] = x
    return averages


def broadcast(variables, root_rank=0):
    """Gives all workers the values that worker `root_rank` holds.

    Args:
        variables: list of Keras or TensorFlow variables, equal in number, order and shapes.
    """
    plain = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    hvd.broadcast_variables(plain, root_rank)


def sum_over_workers(values):
    """Sums a list of numbers over all workers in float64 (integers are exact up to 2^53)."""
    total = hvd.allreduce(tf.constant(values, tf.float64), op=hvd.Sum, name="sum_over_workers")
    return total.numpy().tolist()


def average_moving_statistics(model):
    """Averages the model's floating-point state (batch norm's moving mean and variance).

    Each worker sees its own part of the batch; call this before evaluation and before saving.
    """
    statistics = [v for v in model.non_trainable_variables if "float" in str(v.dtype)]
    averages = _average([tf.convert_to_tensor(v) for v in statistics])
    for variable, average in zip(statistics, averages):
        variable.assign(average)


def check_identical(variables):
    """Checks that all workers hold the same bits.

    Args:
        variables: list of Keras or TensorFlow variables, in the same order on all workers.

    Raises:
        RuntimeError: on every worker, naming the first variable that differs.
    """
    digests = [hashlib.sha256(np.asarray(v).tobytes()).digest()[:8] for v in variables]
    own = np.frombuffer(b"".join(digests), np.int64)
    all_digests = hvd.allgather(tf.constant(own[None]), name="check_identical").numpy()
    differs = (all_digests != all_digests[0]).any(axis=0)
    if differs.any():
        first = int(differs.argmax())
        workers = np.flatnonzero(all_digests[:, first] != all_digests[0, first]).tolist()
        raise RuntimeError(
            f"The workers have drifted apart: variable '{_name(variables[first])}' on worker(s) "
            f"{workers} differs from that on worker 0 ({int(differs.sum())} of {len(variables)} "
            "variables differ). Were all variables broadcast, and is every gradient averaged?"
        )


def _name(variable):
    return getattr(variable, "path", variable.name)


class BroadcastVariables(keras.callbacks.Callback):
    """Starts all workers from the model and optimizer state of worker `root_rank`.

    Raises:
        ValueError: when training begins, if the model is not built yet.
    """

    def __init__(self, root_rank=0):
        super().__init__()
        self.root_rank = root_rank

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(
                "BroadcastVariables needs the variables before the first batch, but the model has "
                "none yet. Begin it with a keras.Input, or call model.build(input_shape) before "
                f"`fit`. Received: model={self.model.name!r}"
            )
        optimizer = self.model.optimizer
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        broadcast([*self.model.variables, *optimizer.variables], self.root_rank)


class AverageMovingStatistics(keras.callbacks.Callback):
    """Averages batch norm's moving statistics before each evaluation and at the end of an epoch.

    Put it before callbacks that save the model.
    """

    def on_test_begin(self, logs=None):
        average_moving_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        average_moving_statistics(self.model)
