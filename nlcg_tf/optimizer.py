"""The NLCG optimizer, after Adya, Palakkode & Tuzel 2018, arXiv 1812.02886."""

import collections
import logging
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from nlcg_tf import direction, fused, reference
from nlcg_tf import line_search as line_searches
from nlcg_tf import preconditioner as preconditioners
from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.configurable import check_choice, check_number, resolve
from nlcg_tf.observed_loss import ObservesLoss
from nlcg_tf.reductions import Sums
from nlcg_tf.reference import COUNTS, REALS
from nlcg_tf.saving import KnowsItsLayout
from nlcg_tf.variables import check_distinct, check_gradients, plain

if keras.backend.backend() == "tensorflow":
    from nlcg_tf import replicas

# The arguments that decide which slots there are and what they mean.
OF_THE_SLOTS = ("update_rule", "preconditioner", "line_search", "nesterov", "lars_coefficient")

logger = logging.getLogger("nlcg_tf")


@keras.saving.register_keras_serializable(package="nlcg_tf")
class NLCG(ObservesLoss, KnowsItsLayout, CountsUpdates, keras.optimizers.Optimizer):
    """Preconditioned nonlinear conjugate gradients: a Keras optimizer for large batches.

    For networks with batch norm use `NLCG(schedule, preconditioner="spectral")`, otherwise
    `NLCG(learning_rate)`:

    >>> model.compile(optimizer=nlcg_tf.NLCG(learning_rate=0.1), loss="mse")

    In a custom training loop, pass the loss to the optimizer before the gradients:

    >>> with tf.GradientTape() as tape:
    ...     loss = loss_fn(model(x, training=True), y)
    >>> optimizer.observe_loss(loss)
    >>> optimizer.apply(tape.gradient(loss, variables), variables)

    All trainable variables together form one weight vector. It moves along a conjugate direction
    of the preconditioned gradient; `nlcg_tf.reference` has the update in twelve lines, and
    docs/optimizer.md explains them. Algorithm 1 of the paper is `NLCG(preconditioner="bfgs",
    update_rule="fletcher_reeves", line_search="online", nesterov=False)`.

    An update is skipped if its gradient, loss or step size is not finite. It then changes neither
    the weights nor the state, and `diagnostics()["skipped_updates"]` counts it. With
    `gradient_accumulation_steps=k` an update of k micro-batches equals one of the whole batch:
    losses are averaged, and schedules and EMA advance once per update.

    Args:
        learning_rate: float, a `LearningRateSchedule` (a step is an update), or a callable.
        update_rule: `"blended"`, `"momentum"`, `"fletcher_reeves"` or `"polak_ribiere"`; by default
            `"momentum"` with `preconditioner="spectral"`, otherwise `"blended"`.
        preconditioner: `"normalized_bfgs"`, `"spectral"`, `"bfgs"` (the paper's), `None` (P g = g),
            or a `nlcg_tf.preconditioner.Preconditioner` with settings of your own.
        line_search: `None`, `"online"` (the paper's), `"step"` (the released code's default), or
            an object of `nlcg_tf.line_search` with thresholds of your own.
        nesterov: bool. Whether the step looks ahead along the coming direction, as Keras'
            `SGD(nesterov=True)`.
        momentum: float in [0, 1). The beta of `"momentum"`; for `"blended"`, the beta when the
            gradients are pure noise.
        epsilon: float, at least 1e-37; added to what gradients are divided by.
        lars_coefficient: float > 0 or `None`. If set, the step of each variable v is scaled by
            lars_coefficient * ||v|| / (||d_v|| + epsilon) (You et al. 2017), and by 1 where v is
            all zero, which would never leave zero otherwise.
        fused: `"auto"` uses the fused op if possible, and otherwise the reference update in Keras
            operations. `True` raises an error if the op cannot be used. `False` always uses the
            reference update. The op needs the TensorFlow backend without XLA and without
            `tf.distribute` strategies, and float32 or float64 variables. With `"spectral"` or a
            preconditioner of your own it needs the rule `"momentum"` or `"fletcher_reeves"`. The
            logger "nlcg_tf" reports at level DEBUG which of the two runs.
        name: string.
        **kwargs: every other argument of `keras.optimizers.Optimizer`, with its meaning.

    Raises:
        ValueError: for an argument outside its range; by a training step without a loss where the
            line search or the update rule needs one.
        RuntimeError: by a training step where `fused=True` cannot be met.
    """

    # Of a worker that holds a shard of the state: `nlcg_tf.horovod.sharding.SumsOfShards`.
    sums = Sums()

    def __init__(
        self,
        learning_rate: float | LearningRateSchedule | Callable[[], float] = 0.1,
        update_rule: str | None = None,
        preconditioner: Any = "normalized_bfgs",
        line_search: Any = None,
        nesterov: bool = True,
        momentum: float = 0.9,
        epsilon: float = 1e-8,
        lars_coefficient: float | None = None,
        fused: bool | str = "auto",
        name: str = "nlcg",
        **kwargs: Any,
    ) -> None:
        check_choice("update_rule", update_rule, [None, *direction.RULES])
        check_choice("nesterov", nesterov, [True, False])
        check_choice("fused", fused, ["auto", True, False])
        check_number("momentum", momentum, 0, 1 - 1e-9)
        check_number("epsilon", epsilon, 1e-37, 1e30)
        if lars_coefficient is not None:
            check_number("lars_coefficient", lars_coefficient, 1e-300, 1e30)
        # Keras takes these as they come.
        if isinstance(learning_rate, numbers.Real):
            check_number("learning_rate", learning_rate, 0, 1e30)
            learning_rate = float(learning_rate)
        for argument in ("weight_decay", "clipnorm", "clipvalue", "global_clipnorm"):
            if kwargs.get(argument) is not None:
                check_number(argument, kwargs[argument], 0, 1e30)
        if kwargs.get("loss_scale_factor") is not None:
            check_number("loss_scale_factor", kwargs["loss_scale_factor"], 1e-30, 1e30)
        if "ema_momentum" in kwargs:
            check_number("ema_momentum", kwargs["ema_momentum"], 0, 1)
        for argument in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            steps = kwargs.get(argument)
            if steps is not None and not isinstance(steps, numbers.Integral):
                raise ValueError(
                    f"`{argument}` must be an integer or None. Received: {argument}={steps!r}"
                )
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        # Of each variable that this class adds. Keras would take those in a list for more of them.
        self._first_values: collections.UserList[tuple[Any, Any]] = collections.UserList()
        self.preconditioner = preconditioners.get(preconditioner)
        is_spectral = isinstance(self.preconditioner, preconditioners.Spectral)
        self.update_rule = update_rule or ("momentum" if is_spectral else "blended")
        methods = ("initial_state", "update")
        self.line_search = resolve("line_search", line_search, line_searches.NAMES, methods)
        self.nesterov = nesterov
        self.momentum = momentum
        self.epsilon = epsilon
        self.lars_coefficient = lars_coefficient
        self.fused = fused
        self._watch_loss(self.line_search is not None or self.update_rule == "blended")
        self._count_without_slots = len(self.variables)
        self._updated = None  # positions of the variables of the last update

    def build(self, var_list: Sequence[Any]) -> None:
        """Creates the slots and scalars.

        Raises:
            ValueError: naming the entry, if one is not a floating-point variable or appears twice;
                and if the preconditioner's initial state does not fit.
        """
        if self.built:
            return
        var_list = list(var_list)
        for v in var_list:
            if not hasattr(v, "assign") or not hasattr(v, "dtype"):
                raise ValueError(f"NLCG updates variables. Received: {v!r} of type {type(v)}")
        check_distinct(var_list)
        for v in var_list:
            if "float" not in keras.backend.standardize_dtype(v.dtype):
                raise ValueError(
                    "NLCG updates variables of floating-point numbers. Received: variable "
                    f"'{getattr(v, 'path', v.name)}' of dtype {v.dtype}"
                )
        super().build(var_list)
        self.compute_dtype = keras.backend.result_type(
            *{keras.backend.standardize_dtype(v.dtype) for v in var_list}, "float32"
        )
        preconditioner = self.preconditioner or preconditioners.Preconditioner()
        states = [preconditioner.initial_state(tuple(v.shape)) for v in var_list]
        for v, state in zip(var_list, states):
            self._check_state(v, state)
        entries = list(zip(var_list, states))
        self.slots = {
            name: [self._add_slot(v, name, *state.get(name, ())) for v, state in entries]
            for name in dict.fromkeys(name for state in states for name in state)
        }
        for name in self._own_slots(preconditioner):
            self.slots[name] = [self._add_slot(v, name, v.shape) for v in var_list]
        if preconditioner.uses_steps and not self.nesterov and not self.sums.is_divided:
            # For each variable sum(g_prev d) and sum(d h d) of its last update, each in two parts
            # of this type that make up a double. Only the fused op keeps them; -1: not known.
            self.curvature_sums = self._add_state(
                "curvature_sums", np.full((len(var_list), 4), -1.0), self.compute_dtype
            )
        if self.lars_coefficient:
            ones = np.ones(len(var_list))
            self.trust_ratios = self._add_state("trust_ratios", ones, self.compute_dtype)
        # Scalars lie together in two vectors: one to read, and one kernel to write, not a dozen.
        state = self.line_search.initial_state() if self.line_search else {}
        if taken := set(REALS) & set(state):
            raise ValueError(
                f"`line_search` has a state of the optimizer's own name: {', '.join(taken)}. "
                f"Received: line_search={self.line_search!r}"
            )
        if self.line_search and "learning_rate_scale" not in state:
            raise ValueError(
                "`line_search` must have a state `learning_rate_scale`. Received: "
                f"line_search={self.line_search!r} with {list(state)}"
            )
        self.real_names = [*REALS, *state]
        values = [*[0.0] * len(REALS), *state.values()]
        self.reals = self._add_state("reals", values, self.compute_dtype)
        self.counts = self._add_state("counts", [0] * len(COUNTS), "int")

    def _start_anew(self):
        """Makes the state that of an optimizer that is just built; Keras' own part of it too."""
        for variable in self.variables[self._count_without_slots :]:
            variable.assign(ops.zeros(variable.shape, variable.dtype))
        for variable, value in self._first_values:
            variable.assign(ops.broadcast_to(ops.cast(value, variable.dtype), variable.shape))
        self._updated, self._loss_is_known = None, False

    def __setattr__(self, name, value):
        if name in OF_THE_SLOTS and getattr(self, "built", False):
            raise ValueError(
                f"`{name}` cannot change once the optimizer is built, since its slots are those of "
                f"the settings before. Make a new one. Received: {name}={value!r}"
            )
        super().__setattr__(name, value)

    def _own_slots(self, preconditioner):
        """Names of the slots that the update needs besides the preconditioner's."""
        uses_steps, rule = preconditioner.uses_steps, self.update_rule
        blends, is_pr = rule == "blended", rule == "polak_ribiere"
        # Made anew, P g_prev would cost as much as P g, or be of weights that have moved.
        is_cheap = preconditioner.couples == "elements" and not preconditioner.uses_weights
        names = ["direction"]
        if uses_steps or blends or (is_pr and is_cheap):
            names.append("previous_gradient")
        looks_back = is_pr or (self.nesterov and (uses_steps or blends))
        if looks_back and not is_cheap:
            names.append("previous_preconditioned")
        return names

    def _check_state(self, variable, state):
        if taken := set(reference.OWN_SLOTS) & set(state):
            raise ValueError(
                f"`preconditioner` has slots of the optimizer's own name: {', '.join(taken)}. "
                f"Received: preconditioner={self.preconditioner!r}"
            )
        for name, (shape, _) in state.items():
            couples = self.preconditioner.couples
            if couples == "elements" and tuple(shape) != tuple(variable.shape):
                raise ValueError(
                    f"`preconditioner` couples elements, so its state '{name}' must have the shape "
                    f"{tuple(variable.shape)} of the variable. Received: shape={tuple(shape)} of "
                    f"preconditioner={self.preconditioner!r}"
                )

    def _add_slot(self, variable, name, shape=None, value=0.0):
        """What the preconditioner keeps for a variable; `None` without a shape."""
        if shape is None:
            return None
        initializer = keras.initializers.Constant(value)
        if tuple(shape) == tuple(variable.shape):
            slot = self.add_variable_from_reference(variable, name, initializer)
        else:
            slot = self.add_variable(shape, initializer, variable.dtype, name=name)
        self._first_values.append((slot, value))
        return slot

    def _add_state(self, name, values, dtype):
        state = self.add_variable(
            np.shape(values),
            initializer=lambda shape, dtype: ops.convert_to_tensor(values, dtype),
            dtype=dtype,
            aggregation="only_first_replica",
            name=name,
        )
        self._first_values.append((state, values))
        return state

    def _apply_weight_decay(self, variables):
        """Left to the update, so that a skipped update leaves the weights alone."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        check_distinct(trainable_variables)
        # A list as a gradient would have no shape, and be broadcast.
        grads = [g if hasattr(g, "shape") else ops.convert_to_tensor(g) for g in grads]
        check_gradients(grads, trainable_variables)
        if keras.backend.backend() == "tensorflow":
            grads = replicas.dense_gradients(grads, trainable_variables)
        positions = [self._get_variable_index(v) for v in trainable_variables]
        self._warn_of_other_variables(positions)
        weight_decays = [
            self.weight_decay if self.weight_decay and self._use_weight_decay(v) else 0.0
            for v in plain(trainable_variables)
        ]
        variables = {
            "weights": list(trainable_variables),
            "reals": self.reals,
            "counts": self.counts,
        }
        variables["slots"] = {
            name: [slot[i] for i in positions] for name, slot in self.slots.items()
        }
        if hasattr(self, "curvature_sums"):
            variables["curvature_sums"] = self.curvature_sums
        if self.lars_coefficient:
            variables["trust_ratios"] = self.trust_ratios
        if self._uses_loss:
            variables["loss"] = self.update_loss

        def update(tensors, variables):
            *gradients, learning_rate = tensors
            path = self._path(variables["weights"])
            path.update(self, gradients, learning_rate, variables, positions, weight_decays)

        learning_rate = ops.convert_to_tensor(learning_rate)
        if keras.backend.backend() == "tensorflow":
            gradients = replicas.sum_over_replicas(grads)
            replicas.update_each(update, [*gradients, learning_rate], variables)
        else:
            update([*grads, learning_rate], variables)

    def _warn_of_other_variables(self, positions):
        before, self._updated = self._updated, frozenset(positions)
        looks_back = self.update_rule != "momentum" or "previous_gradient" in self.slots
        if looks_back and before not in (None, self._updated):
            warnings.warn(
                "NLCG updates other variables than in its last update. What it knows of the last "
                "step, as curvature and beta, is of those: use one NLCG for each set of variables",
                stacklevel=3,
            )

    def _path(self, weights):
        """The module that does this update: `nlcg_tf.fused` or `nlcg_tf.reference`."""
        if self.fused is False:
            return reference
        reason = fused.why_not(self, weights)
        if self.fused is True and reason:
            raise RuntimeError(f"`fused=True`: {reason}")
        logger.debug("NLCG update: %s", f"reference update, {reason}" if reason else "fused op")
        return reference if reason else fused

    def _update_flags(self):
        is_update, _ = super()._update_flags()
        counts = dict(zip(COUNTS, ops.unstack(ops.convert_to_tensor(self.counts), len(COUNTS))))
        is_update = is_update & (counts["last_update_applied"] == 1)
        return is_update, counts["updates"] == ops.cast(is_update, counts["updates"].dtype)

    def diagnostics(self) -> dict[str, float]:
        """What the last update did, as Python floats.

        Returns:
            dict with "beta"; "step_size" (learning rate times scale, and with `"blended"` times the
            factor of the gradients' length); "learning_rate_scale" (1 without a line search);
            "curvature" (y^T s, with BFGS); "cosine" of the angle between the step and the negative
            gradient; "gain_ratio" (with `"blended"`); "preconditioner_mean" (the harmonic mean of h
            with BFGS, which should stay within some powers of ten; else 1); and the counts
            "updates", "skipped_updates" and "rejected_curvatures" (updates whose y^T s was not
            positive, or too small to be told from rounding). All are zero before the first update,
            but for the scale.
        """
        shown = (*REALS[1:7], "learning_rate_scale", *COUNTS[:3])
        values = dict.fromkeys(shown, 0.0) | {"learning_rate_scale": 1.0}
        if self.built:
            values.update(zip(self.real_names, ops.convert_to_numpy(self.reals).tolist()))
            values.update(zip(COUNTS, ops.convert_to_numpy(self.counts).tolist()))
        return {name: float(values[name]) for name in shown}

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            update_rule=self.update_rule,
            preconditioner=keras.saving.serialize_keras_object(self.preconditioner),
            line_search=keras.saving.serialize_keras_object(self.line_search),
            nesterov=self.nesterov,
            momentum=self.momentum,
            epsilon=self.epsilon,
            lars_coefficient=self.lars_coefficient,
            fused=self.fused,
        )
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "NLCG":
        """The reverse of `get_config`; `custom_objects` maps names to classes of your own."""
        if not custom_objects:  # a scope, also an empty one, would hide the one around it
            return super().from_config(dict(config))
        with keras.saving.custom_object_scope(custom_objects):
            return super().from_config(dict(config), custom_objects)
