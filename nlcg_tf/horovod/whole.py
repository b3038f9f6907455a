"""The whole state of a sharded optimizer: in the layout of one that was never divided."""

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from nlcg_tf.horovod.collectives import broadcast, broadcast_first, gather


@contextlib.contextmanager
def gathered(model: keras.Model) -> Iterator[None]:
    """Context in which worker 0 can save a model with a sharded optimizer; all workers enter it.

    >>> with hvd.gathered(model):
    ...     if hvd.rank() == 0:
    ...         model.save("model.keras")

    Raises:
        ValueError: if the model's optimizer is not sharded, or not built.
    """
    sharded = getattr(model, "optimizer", None)
    whole = gather_optimizer(sharded)
    if whole is not None:
        model.optimizer = whole
    try:
        yield
    finally:
        model.optimizer = sharded


def gather_optimizer(optimizer: keras.optimizers.Optimizer) -> Any:
    """Gathers a sharded optimizer's state on worker 0; to be called on all workers.

    Slot by slot: besides the whole state in its host memory, worker 0 holds one slot, and so do the
    others for a moment.

    Args:
        optimizer: made by `DistributedOptimizer(shard=True)`, and built.

    Returns:
        On worker 0 an optimizer of the plain class with the state, elsewhere `None`.

    Raises:
        ValueError: for another optimizer.
    """
    inner = _sharded(optimizer)
    whole = failure = None
    shared_state = []
    if hvd.rank() == 0:
        try:
            inner.warn_within_virtual_batch()
            whole = whole_optimizer(optimizer)
            shared_state = _shared_state(optimizer, whole)
        except Exception as error:
            failure = error
    _end_together(failure)
    for name, number in sorted(inner.division.slots):
        layout = inner.division.layouts[number]
        (vector,) = gather([tf.convert_to_tensor(inner.division.slots[name, number])])
        if whole is not None:
            for i, value in zip(layout.indices, layout.restore(vector)):
                _plain(whole).recorded_slots[name, i].assign(value)
    for own, of_whole in shared_state:
        of_whole.assign(own)
    return whole


def scatter_optimizer(optimizer: keras.optimizers.Optimizer, whole: Any) -> None:
    """Gives a sharded optimizer the state that worker 0 has; to be called on all workers.

    Args:
        optimizer: made by `DistributedOptimizer(shard=True)`, and built.
        whole: on worker 0 what `whole_optimizer` or `gather_optimizer` made, perhaps restored by
            `tf.train.Checkpoint`; elsewhere `None`.

    Raises:
        ValueError: for another optimizer; on the other workers a RuntimeError if `whole` is none.
    """
    inner = _sharded(optimizer)
    own = {k: x for k, x in inner.recorded_slots.items() if k not in inner.division.slots}
    wanted = {key: tuple(slot.shape) for key, slot in own.items()}
    for name, number in inner.division.slots:
        layout = inner.division.layouts[number]
        wanted.update({(name, i): shape for i, shape in zip(layout.indices, layout.shapes)})
    slots = getattr(_plain(whole), "recorded_slots", {})
    failure = None
    if hvd.rank() == 0 and {key: tuple(x.shape) for key, x in slots.items()} != wanted:
        failure = ValueError(f"`whole` must be of `whole_optimizer`. Received: whole={whole!r}")
    _end_together(failure)
    for name, number in sorted(inner.division.slots):
        layout = inner.division.layouts[number]
        if hvd.rank() == 0:
            slots = _plain(whole).recorded_slots
            vector = layout.flatten([slots[name, i].value for i in layout.indices])
        else:
            vector = tf.zeros([layout.elements], layout.dtype)
        vector = broadcast_first(vector)
        begin, end = layout.range()
        inner.division.slots[name, number].assign(vector[begin:end])
    if whole is not None:
        for own, of_whole in _shared_state(optimizer, whole):
            own.assign(of_whole)
    broadcast(optimizer.variables)


def take_own_shard(optimizer: keras.optimizers.Optimizer, whole: Any) -> None:
    """Gives a sharded optimizer its shard of a whole state that this worker has.

    Args:
        optimizer: as in `gather_optimizer`.
        whole: of `whole_optimizer`.
    """
    inner = _sharded(optimizer)
    for (name, number), shard in inner.division.slots.items():
        layout, slots = inner.division.layouts[number], _plain(whole).recorded_slots
        shard.assign(layout.own_shard([slots[name, i].value for i in layout.indices]))
    for own, of_whole in _shared_state(optimizer, whole):
        own.assign(of_whole)


def whole_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """An optimizer of the plain class for the same variables, in host memory, in its first state.

    Raises:
        ValueError: if `optimizer` is not sharded, or not built.
    """
    variables = _sharded(optimizer)._trainable_variables
    copy = optimizer.__class__.from_config(optimizer.get_config())  # the plain classes
    inner = _plain(copy)
    cls = type(inner)
    members = {"__class__": property(lambda self: cls)}
    inner.__class__ = type(cls.__name__, (_InHostMemory, cls), members)
    with tf.device("CPU:0"):
        copy.build(variables)
    return copy


def first_state(optimizer):
    """A sharded optimizer's whole first state: a vector for each key of its `division.slots`."""
    inner, slots = _sharded(optimizer), _plain(whole_optimizer(optimizer)).recorded_slots
    vectors = {}
    for name, number in inner.division.slots:
        layout = inner.division.layouts[number]
        values = [slots[name, i].value for i in layout.indices]
        vectors[name, number] = layout.flatten(values).numpy()
    return vectors


class RecordsSlots:
    """Mixin for a Keras optimizer: what it keeps for each variable, in `recorded_slots`.

    A mapping from `(name, position of the variable)` to the optimizer's variable.
    """

    def build(self, variables):
        self.recorded_slots = collections.UserDict()  # Keras looks for variables in a dict
        super().build(variables)

    def add_variable_from_reference(self, reference_variable, name=None, initializer="zeros"):
        slot = self._new_slot(reference_variable, name, initializer)
        names = [recorded for recorded, _ in self.recorded_slots]
        self.recorded_slots[name, names.count(name)] = slot
        return slot

    def _new_slot(self, reference, name, initializer):
        return super().add_variable_from_reference(reference, name, initializer)


class _InHostMemory(RecordsSlots):
    """Keras would create the slots where the model's variables are."""

    def _new_slot(self, reference, name, initializer):
        return self.add_variable(reference.shape, initializer, reference.dtype, name=name)


def _end_together(failure):
    """Raises on all workers what went wrong on worker 0, for which the others would wait."""
    message = hvd.broadcast_object(failure and f"{type(failure).__name__}: {failure}")
    if failure:
        raise failure
    if message:
        raise RuntimeError(f"worker 0: {message}")


def _shared_state(optimizer, whole):
    """Pairs of variables, of the sharded and of the plain optimizer, that hold the same."""
    inner, plain = _sharded(optimizer), _plain(whole)
    pairs = [
        (slot, plain.recorded_slots[key])
        for key, slot in inner.recorded_slots.items()
        if key not in inner.division.slots
    ]
    rest = []
    for one, slots in ((optimizer, inner.recorded_slots), (whole, plain.recorded_slots)):
        # A worker's shard has no `curvature_sums`: in the whole state they are not known.
        known = {id(slot) for slot in [*slots.values(), getattr(_plain(one), "curvature_sums", 0)]}
        rest.append([v for v in one.variables if id(v) not in known])
    if len(rest[0]) != len(rest[1]):
        raise ValueError(
            "What a sharded optimizer keeps besides slots must not depend on the number of its "
            f"variables. Received: {type(optimizer).__name__} with {len(rest[0])} such variables, "
            f"whole it has {len(rest[1])}"
        )
    for own, of_whole in (rest := list(zip(*rest))):
        if own.shape != of_whole.shape:
            raise ValueError(
                f"'{own.name}' of a sharded optimizer must have the shape {of_whole.shape} of the "
                f"whole one's, or be a slot. Received: shape={own.shape}"
            )
    return [*pairs, *rest]


def _plain(optimizer):
    return getattr(optimizer, "inner_optimizer", optimizer)


def _sharded(optimizer):
    inner = _plain(optimizer)
    if not hasattr(inner, "division") or not inner.built:
        raise ValueError(
            "`optimizer` must be made by `DistributedOptimizer(shard=True)` and built. Received: "
            f"optimizer={optimizer!r}"
        )
    return inner
