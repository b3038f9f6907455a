"""Optimizers of which each worker keeps and updates a shard: ZeRO stage 1.

Source: Rajbhandari, Rasley, Ruwase & He 2020, arXiv 1910.02054, section 5.1. In place of the ring
all-reduce of the gradients come its two halves: the gradients are reduce-scattered, each worker
updates its shard of the weights with its shard of the state, and the weights are gathered.
"""

import collections
import dataclasses
import math

import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from keras import optimizers

from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.horovod.averaging import Averaging
from nlcg_tf.horovod.collectives import average, gather, name_of, reduce_scatter
from nlcg_tf.horovod.layout import divide
from nlcg_tf.horovod.shardable import NEEDS_WHOLE, cannot_serve, check_slots
from nlcg_tf.horovod.whole import RecordsSlots, take_own_shard, whole_optimizer
from nlcg_tf.polar import shared_by
from nlcg_tf.reductions import Sums
from nlcg_tf.variables import check_distinct, check_gradients, plain

SHARDS_ONLY = (
    "This optimizer is sharded, each worker has a shard of its state. Save and restore inside of "
    "`with nlcg_tf.horovod.gathered(model)`, which all workers enter; without a compiled model "
    "give tf.train.Checkpoint the optimizer that `gather_optimizer` returns."
)


class SumsOfShards(Sums):
    """Sums over all variables, of which each worker holds a shard.

    Args:
        layouts: list of `Layout`.
    """

    is_divided = True

    def __init__(self, layouts):
        self._elements = sum(layout.elements for layout in layouts)
        self._shapes = [layout.own_shapes for layout in layouts]

    def over_workers(self, own):
        return hvd.allreduce(own, op=hvd.Sum, name="Horovod_sum_of_shards")

    def count(self, xs):
        return self._elements

    def all_finite(self, xs):
        return self.over_workers(tf.cast(~super().all_finite(xs), tf.float32)) == 0

    def pieces(self, vectors):
        tensors = []
        for vector, shapes in zip(vectors, self._shapes):
            shards = tf.split(vector, [math.prod(shape) for shape in shapes]) if shapes else []
            tensors += [tf.reshape(shard, shape) for shard, shape in zip(shards, shapes)]
        # A worker without variables has a matrix without elements: there is something to work on.
        return tensors or [tf.reshape(vectors[0], (0, 1))]

    def join(self, tensors):
        flat, vectors = iter([tf.reshape(x, [-1]) for x in tensors]), []
        for shapes in self._shapes:
            own = [next(flat) for _ in shapes]
            vectors.append(tf.concat(own, axis=0) if own else tf.zeros([0], tensors[0].dtype))
        return vectors


class KeepsShards:
    """Mixin for what is saved as a whole: a sharded optimizer, or a loss scale around one."""

    def save_own_variables(self, store):
        """Refused: a worker has a shard only."""
        raise RuntimeError(SHARDS_ONLY)

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        """Refused for `tf.train.Checkpoint`, which would take one worker's shard for all."""
        if save_type == "checkpoint":
            raise RuntimeError(SHARDS_ONLY)
        return super()._trackable_children(save_type, **kwargs)

    def load_own_variables(self, store):
        """Restores this worker's shard of a whole state; to be called on every worker."""
        if not self.built:
            super().load_own_variables(store)  # Keras warns that there are no slots yet
            return
        whole = whole_optimizer(self)
        whole.load_own_variables(store)
        saved = sum(name.isdigit() for name in store.keys())
        # Of another number Keras has warned, and loaded nothing.
        if saved in (len(whole.variables), getattr(whole, "_count_without_slots", None)):
            take_own_shard(self, whole)


@dataclasses.dataclass
class Division:
    """What a worker keeps of an optimizer. Keras does not look into it for variables.

    Attributes:
        variables: list of the model's variables.
        layouts: list of `Layout`.
        weights: list of Keras variables, this worker's shard of the weights of each layout.
        slots: dict from `(name, number of the layout)` to the slot of that shard.
        of_the_whole: dict from `(name, number of the variable)` to what Keras itself keeps of it;
            `None` before it is made.
    """

    variables: list = dataclasses.field(default_factory=list)
    layouts: list = dataclasses.field(default_factory=list)
    weights: list = dataclasses.field(default_factory=list)
    slots: dict = dataclasses.field(default_factory=dict)
    of_the_whole: dict | None = None


class BuildsOnWhole(optimizers.Optimizer):
    """Last base of a `Sharded` optimizer: Keras' own part is built on the whole variables.

    The optimizer's class is built on this worker's shards. Behind it Keras accumulates gradients
    and averages weights, and its update takes the model's variables.
    """

    def build(self, shards):
        slots, self.recorded_slots = self.recorded_slots, collections.UserDict()
        super().build(self.division.variables)
        self.division.of_the_whole, self.recorded_slots = dict(self.recorded_slots), slots
        for i, shard in enumerate(shards):
            self._trainable_variables_indices[self._var_key(shard)] = i


class Sharded(KeepsShards, RecordsSlots, Averaging):
    """Mixin for a Keras optimizer; see `DistributedOptimizer(shard=True)`.

    Keras sees the model's variables, the optimizer's own class only this worker's shards of them:
    flat variables, each of one dtype and of variables with or without weight decay.

    Attributes:
        division: a `Division`.
        sums: a `SumsOfShards`.
    """

    def build(self, variables):
        if self.built:
            return
        variables = list(variables)
        check_distinct(variables)
        preconditioner = getattr(self, "preconditioner", None)
        whole = preconditioner is not None and preconditioner.couples == "variable"
        layouts = divide(variables, self._use_weight_decay, whole, hvd.size(), hvd.rank())
        weights = [self._new_shard(i, layout, variables) for i, layout in enumerate(layouts)]
        self.division, self.sums = Division(variables, layouts, weights), SumsOfShards(layouts)
        super().build(weights)
        if self.division.of_the_whole is None:
            raise ValueError(
                f"`shard=True` needs a `build` that calls `super().build`, as that of "
                f"{type(self).__name__} does not"
            )
        self.division.slots = dict(self.recorded_slots)
        self._set_first_state()
        check_slots(self)
        self.recorded_slots |= self.division.of_the_whole
        for slot in self.division.slots.values():
            slot.shard_of = self  # what compares and broadcasts variables passes over it

    def _set_first_state(self):
        """Of a preconditioner, which has made one for the shapes of the shards."""
        preconditioner = getattr(self, "preconditioner", None)
        if preconditioner is None:
            return
        for number, layout in enumerate(self.division.layouts):
            states = [preconditioner.initial_state(shape) for shape in layout.shapes]
            names = dict.fromkeys(name for state in states for name in state)
            lacking = any(name not in state for state in states for name in names)
            if lacking or (names and layout.whole):
                raise ValueError(f"`shard=True`: {cannot_serve(preconditioner)}")
            for name in names:
                first = [
                    tf.broadcast_to(tf.cast(state[name][1], layout.dtype), shape)
                    for state, shape in zip(states, layout.shapes)
                ]
                self.division.slots[name, number].assign(layout.own_shard(first))

    def __setattr__(self, name, value):
        if name in NEEDS_WHOLE and value:
            raise ValueError(
                f"`shard=True`: `{name}` needs whole variables. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def divide_anew(self, whole):
        """Gives the workers that there are now their shards of a whole state.

        Args:
            whole: dict from the keys of `division.slots` to whole vectors.
        """
        workers = {"workers": hvd.size(), "rank": hvd.rank()}
        division = self.division
        division.layouts = [dataclasses.replace(layout, **workers) for layout in division.layouts]
        self.sums = SumsOfShards(division.layouts)
        for i, (layout, shard) in enumerate(zip(division.layouts, division.weights)):
            _resize(shard, np.zeros(layout.lengths[layout.rank], layout.dtype))
            self._trainable_variables_indices[self._var_key(shard)] = i
        for (name, number), shard in division.slots.items():
            begin, end = division.layouts[number].range()
            _resize(shard, whole[name, number][begin:end])

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Refused once the shards are made, of which each is of one kind."""
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay` must be called before a sharded optimizer is built"
            )
        super().exclude_from_weight_decay(var_list, var_names)

    def _new_shard(self, number, layout, variables):
        shard = layout.own_shard(plain([variables[i] for i in layout.indices]))
        return keras.Variable(shard, dtype=layout.dtype, name=f"shard_{number}")

    def _use_weight_decay(self, variable):
        division = getattr(self, "division", Division())
        for shard, layout in zip(division.weights, division.layouts):
            if variable is shard or variable is shard.value:  # Keras asks with either
                return layout.decays
        return super()._use_weight_decay(*plain([variable]))

    def _in_order(self, grads, given):
        variables = given or self._trainable_variables
        if self.built and grads:
            self._check_variables_are_known(variables)
            check_distinct(variables)
            found = dict(zip(map(self._get_variable_index, variables), grads))
            if not len(found) == len(grads) == len(self._trainable_variables):
                raise ValueError(
                    "`shard=True` updates all variables together. Received: gradients of "
                    f"{len(grads)} of {len(self._trainable_variables)} variables"
                )
            # The vector's order, whatever order they come in.
            variables = self._trainable_variables
            grads = [found[i] for i in range(len(grads))]
        for gradient, variable in zip(grads, variables):
            if gradient is None:
                raise ValueError(
                    f"`shard=True` needs a gradient of every variable, '{name_of(variable)}' has "
                    "none. Freeze its layer (`trainable = False`) before the optimizer is built"
                )
        if variables:  # without them Keras says what is missing
            grads = [g if hasattr(g, "shape") else tf.convert_to_tensor(g) for g in grads]
            check_gradients(grads, variables)
        return grads, variables or None

    @property
    def _averages_first(self):
        return False

    def _reduce(self, grads):
        """This worker's shards of the mean gradients, in place of the gradients."""
        self._without_average = 0
        extra = self._averaged_scalars()
        if extra:
            means = average([tf.convert_to_tensor(x) for x in extra])
            for variable, mean in zip(extra, means):
                variable.assign(mean)
        shards = []
        for layout in self.division.layouts:
            own = [tf.convert_to_tensor(grads[i]) for i in layout.indices]
            vector = self._compress(layout.flatten([tf.cast(g, layout.dtype) for g in own]))
            shard = tf.cast(reduce_scatter(vector, layout.lengths), layout.dtype)
            shards.append(tf.ensure_shape(shard, [layout.lengths[layout.rank]]))
        return shards

    def _clip_gradients(self, grads):
        if not self.global_clipnorm:
            return super()._clip_gradients(grads)
        shards = self._reduce(grads)
        dtype = keras.backend.result_type(*(x.dtype for x in shards))
        norm = tf.sqrt(self.sums.sum([tf.cast(x * x, dtype) for x in shards]))
        scale = self.global_clipnorm / tf.maximum(norm, self.global_clipnorm)
        # As Keras': a norm that is not finite makes gradients that are not.
        scale = tf.where(tf.math.is_finite(norm), scale, float("nan"))
        return [x * tf.cast(scale, x.dtype) for x in shards]

    def _apply_weight_decay(self, variables):
        # Keras calls it with the model's variables; their shards decay in the update.
        if variables is self.division.weights:
            super()._apply_weight_decay(variables)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        self._update_shards(grads, learning_rate)
        vectors = gather([tf.convert_to_tensor(shard) for shard in self.division.weights])
        weights = plain(self._trainable_variables)
        for layout, vector in zip(self.division.layouts, vectors):
            for i, value in zip(layout.indices, layout.restore(vector)):
                weights[i].assign(value)

    def _update_shards(self, grads, learning_rate):
        """Updates this worker's shard of the weights, in `division.weights`."""
        weights = plain(self._trainable_variables)
        for layout, shard in zip(self.division.layouts, self.division.weights):
            shard.assign(layout.own_shard([weights[i] for i in layout.indices]))
        # The factors of a shard are this worker's alone.
        with shared_by(None):
            self._apply_weight_decay(self.division.weights)
            super()._backend_update_step(grads, self.division.weights, learning_rate)


def _resize(variable, value):
    """Gives a Keras variable a value of another length; whoever holds it need not know."""
    variable._initialize(tf.convert_to_tensor(value))
    variable._shape = tuple(value.shape)


class AgreeingLossScale(KeepsShards, CountsUpdates):
    """Mixin for Keras' `LossScaleOptimizer` around a `Sharded` optimizer: all skip together."""

    def check_finite(self, grads):
        overflowed = tf.cast(~super().check_finite(grads), tf.float32)
        return hvd.allreduce(overflowed, op=hvd.Sum, name="Horovod_overflows") == 0
