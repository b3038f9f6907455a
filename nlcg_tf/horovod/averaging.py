"""Optimizers whose gradients are averaged over Horovod's workers."""

import json
import os
import warnings
import zlib

import horovod.tensorflow as hvd
import keras
import tensorflow as tf

from nlcg_tf import fused, replicas
from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.horovod.collectives import allgather_object, average, check_alike, kind_of, name_of
from nlcg_tf.horovod.factors import share
from nlcg_tf.loss_scaling import inner_optimizers
from nlcg_tf.observed_loss import ObservesLoss
from nlcg_tf.polar import shared_by
from nlcg_tf.variables import plain

# Those that come to `_clip_gradients` once an update, with gradients that nobody has used before.
COMES_TO_THE_AVERAGE = (keras.optimizers.Optimizer.apply, ObservesLoss.apply)


class Averaging(CountsUpdates):
    """Mixin for a Keras optimizer; see `DistributedOptimizer`."""

    _are_compared = False  # the first update of all workers
    _has_applied = False
    _without_average = 0  # calls of `apply` since the last average

    def _clip_gradients(self, grads):
        # Keras comes here once an update, after accumulation and before clipping and the update.
        if not self._averages_first:
            grads = self._reduce(grads)
        return super()._clip_gradients(grads)

    @property
    def _averages_first(self):
        """Whether the class has an `apply` of its own, which may use the gradients at once."""
        return super().apply.__func__ not in COMES_TO_THE_AVERAGE

    def apply(self, grads, trainable_variables=None):
        self._has_applied = True
        grads = list(grads)
        given = None if trainable_variables is None else list(trainable_variables)
        # Before what one worker alone may find wrong.
        self._compare(grads, self._trainable_variables if given is None else given)
        grads, given = self._in_order(grads, given)
        if not grads:
            return
        self._without_average += 1
        if self._averages_first:
            if given and not self.built:
                # It may find the optimizers inside of it only now, whose losses are averaged too.
                with keras.name_scope(self.name):
                    self.build(given)
            grads = self._reduce(grads)
        with shared_by(share):
            super().apply(grads, given)
        # A graph is traced with all that any of its calls may do.
        most = (self.gradient_accumulation_steps or 1) if tf.executing_eagerly() else 1
        if self._without_average >= most:
            raise self._train_apart("`apply`", "`_clip_gradients`")

    def _in_order(self, grads, given):
        """The gradients and the variables given, or `None`, as the update takes them."""
        variables = self._trainable_variables if given is None else given
        if len(variables) == len(grads):  # otherwise Keras says what is missing
            grads = replicas.dense_gradients(grads, variables)
        return grads, given

    def apply_gradients(self, grads_and_vars, **kwargs):
        self._has_applied = False
        result = super().apply_gradients(grads_and_vars, **kwargs)
        if not self._has_applied:
            raise self._train_apart("`apply_gradients`", "`apply`")
        return result

    def save_own_variables(self, store):
        self.warn_within_virtual_batch()
        super().save_own_variables(store)

    def warn_within_virtual_batch(self):
        """What is saved has the accumulated gradients of one worker only."""
        if self.built and hvd.size() > 1 and int(self._micro_step()):
            warnings.warn(
                f"Saved within a virtual batch of {self.gradient_accumulation_steps} steps: the "
                f"gradients that worker {hvd.rank()} has accumulated are saved, those of the other "
                "workers are not. Save after an update, so that no worker has accumulated any.",
                stacklevel=2,
            )

    def _train_apart(self, method, place):
        return RuntimeError(
            f"The {method} of {type(self).__name__} has ended without the average of the gradients "
            f"over the workers, which would train apart: it does not come to Keras' {place}. "
            "Distribute an optimizer that updates all variables itself."
        )

    def _compare(self, grads, variables):
        """Refuses what would make the workers wait for each other for ever.

        In the first update; outside of graphs, where another variable may be without a gradient,
        in each. Elastic workers are not compared: one that joins has a first update of its own.
        """
        _check_context()
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise ValueError(
                    f"Variable '{name_of(variable)}' is overwritten with its gradient, as the "
                    "scales of float8 are. Such gradients are not averaged, and the workers would "
                    "train apart. Use another precision with several workers."
                )
        is_done = self._are_compared and not tf.executing_eagerly()
        if is_done or os.environ.get("HOROVOD_ELASTIC") == "1":
            return
        own = self._observed(), list(map(_kind, grads))
        if self._are_compared:
            digest = tf.constant([zlib.crc32(json.dumps(own).encode())], tf.int64)
            if len(set(hvd.allgather(digest, name="Horovod_kinds").numpy())) == 1:
                return
        # Outside of the graph that is traced, where Keras can read the settings' values.
        with tf.init_scope():
            if not self._are_compared:
                own[0].update(self._settings(variables))
            settings, kinds = zip(*allgather_object(own))
        for worker, found in enumerate(settings):
            _compare_settings(settings[0], found, worker)
        check_alike(kinds, variables, "a gradient")
        self._are_compared = True

    def _observed(self):
        """Whether the loss of this update was observed: without it one worker alone would stop."""
        known = getattr(self, "_loss_is_known", None)
        return {} if known is None else {"observed loss": "known" if known else "not observed"}

    def _settings(self, variables):
        """All that must be equal, by names, as texts."""
        try:
            config = self.get_config()
        except Exception:  # of a class that nobody saves
            config = {}
        base = type(self).__mro__[1].__name__
        config |= {
            "class": type(self).__name__,
            "shard": base,
            "compression": str(self._wire_dtype),
        }
        config |= {"average_with": len(self._average_with)}
        for number, one in enumerate([self, *inner_optimizers(self)]):
            weights = plain(one._trainable_variables if one.built else variables)
            if isinstance(one, ObservesLoss) and all(hasattr(v, "dtype") for v in weights):
                # The op and the reference update round otherwise.
                is_fused = one.fused is not False and fused.why_not(one, weights) is None
                name = f"fused of inner optimizer {number}" if number else "fused"
                config[name] = "the fused op" if is_fused else "the reference update"
        config.pop("name", None)
        texts = {}
        for name, value in config.items():
            try:
                texts[name] = json.dumps(_without_names(value))
            except (TypeError, ValueError):
                pass  # whatever its text is, it may differ where the value does not
        return texts

    def _reduce(self, grads):
        self._without_average = 0
        dense = [tf.convert_to_tensor(g) for g in grads if g is not None]
        extra = self._averaged_scalars()
        averages = average(
            [*(self._compress(g) for g in dense), *(tf.convert_to_tensor(x) for x in extra)]
        )
        for variable, x in zip(extra, averages[len(dense) :]):
            variable.assign(x)
        averages = iter([tf.cast(x, g.dtype) for x, g in zip(averages, dense)])
        return [None if g is None else next(averages) for g in grads]

    def _averaged_scalars(self):
        """What the caller wants, and the losses of this optimizer and of all inside of it."""
        name = "observed_loss" if self._averages_first else "update_loss"
        losses = [getattr(self, name, None)]
        losses += [getattr(inner, "observed_loss", None) for inner in inner_optimizers(self)]
        return [*self._average_with, *(loss for loss in losses if loss is not None)]

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


def _without_names(value):
    """A part of a config without the names, which Keras counts up in each process for itself."""
    if isinstance(value, dict):
        return {key: _without_names(x) for key, x in value.items() if key != "name"}
    return [_without_names(x) for x in value] if isinstance(value, list) else value


def _kind(gradient):
    """What of a gradient must be the same on all workers, as a text; `None` without a gradient."""
    if gradient is None:
        return None
    return kind_of(gradient if hasattr(gradient, "dtype") else tf.convert_to_tensor(gradient))


def _compare_settings(first, found, worker):
    for name in sorted(first.keys() & found.keys()):
        if first[name] != found[name]:
            raise ValueError(
                f"The workers' optimizers differ in `{name}`: {first[name]} on worker 0, "
                f"{found[name]} on worker {worker}. Give all the same."
            )


def _check_context():
    if replicas.is_compiled_by_xla():
        raise RuntimeError(
            "Horovod's operations cannot be compiled by XLA. Use "
            "`model.compile(..., jit_compile=False)`, or compile the gradients alone."
        )
    if tf.distribute.has_strategy():
        raise RuntimeError(
            "Horovod cannot be combined with a tf.distribute strategy: start one Horovod "
            "worker for each device and leave the strategy out."
        )
