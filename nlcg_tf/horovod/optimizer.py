"""Makes any Keras 3 optimizer distributed over Horovod's workers."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from nlcg_tf.configurable import check_choice
from nlcg_tf.horovod.averaging import Averaging
from nlcg_tf.horovod.shardable import why_not
from nlcg_tf.horovod.sharding import AgreeingLossScale, BuildsOnWhole, Sharded

COMPRESSIONS = {None: None, "fp16": tf.float16, "bf16": tf.bfloat16}


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    compression: str | None = None,
    average_with: Sequence[Any] = (),
    shard: bool = False,
) -> keras.optimizers.Optimizer:
    """Makes a Keras 3 optimizer average its gradients over all Horovod workers.

    `optimizer` itself becomes distributed, and is returned. A saved model has the plain optimizer.

    Each update averages the gradients, and the loss that NLCG observes, in one grouped all-reduce
    before the gradients are clipped (gradients of 16 bits in an all-to-all and an all-gather, so
    that they are added up in float32). With `gradient_accumulation_steps` this happens once per
    update; micro-steps communicate nothing. An optimizer with its own `apply`, such as
    `LossScaleOptimizer` or `MultiOptimizer`, receives averaged gradients; an `apply_gradients` of
    its own comes before and receives those of one worker.

    Args:
        optimizer: a `keras.optimizers.Optimizer`. With dynamic loss scaling, wrap outside:
            `DistributedOptimizer(LossScaleOptimizer(optimizer))`.
        compression: `None`; `"fp16"` or `"bf16"` to send float32 gradients as float16, or as
            bfloat16, which has the range of float32 and less precision.
        average_with: scalar variables to be averaged in the same round, such as a loss to log.
        shard: whether each worker keeps and updates a shard of the optimizer's state only
            (`nlcg_tf.horovod.sharding`): 1/W of the slots and of the update's work, the same bytes
            sent. For Keras' optimizers whose update is elementwise, other classes that say so by
            `is_elementwise = True`, and NLCG in all its forms but for LARS scaling. Every variable
            must have a gradient.

    Returns:
        `optimizer`.

    Raises:
        ValueError: for another argument, an optimizer that is distributed already, or a
            combination that would let the workers train apart.
        RuntimeError: by a training step compiled by XLA, which has no Horovod kernels; by the first
            one, on all workers, if `optimizer` updates variables before gradients are averaged.
        ValueError: by the first training step, on all workers, if their optimizers differ in a
            setting, or their gradients in type or shape; outside of graphs by each step in which a
            variable has a gradient on some of them only; and if a variable is overwritten with its
            gradient (float8).
    """
    _check(optimizer, compression, average_with, shard)
    inner = getattr(optimizer, "inner_optimizer", None)
    target = optimizer
    if shard:
        if inner is not None:
            _exchange_class(optimizer, AgreeingLossScale)
            target = inner
        _exchange_class(target, Sharded, BuildsOnWhole)
    else:
        _exchange_class(target, Averaging)
    target._wire_dtype = COMPRESSIONS[compression]
    # Keras would count the variables in a list as the optimizer's.
    target._average_with = collections.UserList(average_with)
    for each in {id(x): x for x in (optimizer, target)}.values():
        # In a graph it is part of the names by which Horovod knows what the workers do together;
        # Keras counts optimizers of one class up, and a worker may have made more of them.
        each.name = re.sub(r"_\d+$", "", each.name)
    return optimizer


def _is_scalar_variable(x):
    return hasattr(x, "assign") and tuple(x.shape) == () and "float" in tf.as_dtype(x.dtype).name


def _exchange_class(optimizer, base, *last):
    cls = type(optimizer)
    # Keras writes `optimizer.__class__` into a saved model: there it must find the plain class.
    members = {"__class__": property(lambda self: cls), "__doc__": cls.__doc__}
    members.update(from_config=cls.from_config, __reduce_ex__=_refuse_copies)
    optimizer.__class__ = type(f"Distributed{cls.__name__}", (base, cls, *last), members)


def _refuse_copies(self, protocol):
    raise TypeError(
        "A copy of a distributed optimizer would be a plain one, and the workers would train "
        "apart. Copy by `type(optimizer).from_config(optimizer.get_config())`, and distribute that."
    )


def _check(optimizer, compression, average_with, shard):
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`optimizer` must be a Keras 3 optimizer. Received: optimizer={optimizer!r}"
        )
    if isinstance(optimizer, (Averaging, AgreeingLossScale)):
        raise ValueError(f"`optimizer` is distributed already. Received: optimizer={optimizer!r}")
    if hasattr(optimizer, "_allreduce_grads"):
        raise ValueError(
            "`optimizer` is wrapped by Horovod's own DistributedOptimizer, which does not work "
            "with Keras 3 and would accumulate and sum gradients a second time. Pass the plain "
            f"optimizer. Received: optimizer={optimizer!r}"
        )
    check_choice("compression", compression, COMPRESSIONS)
    if not isinstance(average_with, Sequence) or not all(map(_is_scalar_variable, average_with)):
        raise ValueError(
            "`average_with` must be a list of scalar variables of floating-point numbers. "
            f"Received: average_with={average_with!r}"
        )
    check_choice("shard", shard, [True, False])
    if shard and (reason := why_not(optimizer, compression)):
        raise ValueError(f"`shard=True`: {reason}")
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner and (isinstance(inner, Averaging) or inner.gradient_accumulation_steps):
        raise ValueError(
            "`optimizer` wraps an optimizer that is distributed already or accumulates gradients; "
            "workers could disagree on which update to skip. Wrap a LossScaleOptimizer around a "
            "plain optimizer, without `gradient_accumulation_steps`. Received: "
            f"inner_optimizer={inner!r}"
        )
