"""The NLCG optimizer, after Adya, Palakkode & Tuzel 2018, arXiv 1812.02886."""

import json
import logging
import numbers

import keras
import numpy as np
from keras import ops

from nlcg_tf import composed, direction, fused, loss_scaling
from nlcg_tf import line_search as line_searches
from nlcg_tf import preconditioner as preconditioners
from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.composed import COUNTS, REALS

loss_scaling.forward_loss_to_inner_optimizer()
logger = logging.getLogger("nlcg_tf")

# In `observed_loss` where none was observed since the last `apply`. As a loss it is not finite: an
# update with it is skipped.
NO_LOSS = -np.inf


@keras.saving.register_keras_serializable(package="nlcg_tf")
class NLCG(CountsUpdates, keras.optimizers.Optimizer):
    """Preconditioned nonlinear conjugate gradients for mini-batches of any size.

    The whole weight vector w (all trainable variables together) moves along a conjugate direction d
    of the preconditioned gradient. One update with gradient g:

        z = -P g,  delta_new = -g^T z                          see `nlcg_tf.preconditioner`
        beta = kappa clip(delta_new / delta, 0, 1) + (1 - kappa) momentum
        d = z + beta d,  delta = delta_new
        alpha = learning_rate (||g_first|| / ||g||)^(1 - kappa)        ||g||^2 a running mean
        w = w + alpha (d + (1 - kappa) (z + beta d - d))       Nesterov's look-ahead

    kappa in [0, 1] tells how far the last change of the loss was what the gradients foretold
    (`nlcg_tf.noise`): full batches get conjugate gradients, noisy ones momentum. A step longer than
    twice the running mean of their lengths is shortened to that, and d with it.

    Algorithm 1 of the paper is `NLCG(update_rule="fletcher_reeves", preconditioner="bfgs",
    line_search="online", nesterov=False)`, with

        beta = clip(delta_new / delta, 0, 1)                   "fletcher_reeves"
        beta = clip((delta_new + z_prev^T g) / delta, 0, 1)    "polak_ribiere"
        w = w + learning_rate learning_rate_scale d            see `nlcg_tf.line_search`

    Those two rules look at no loss: kappa is 0, and a look-ahead is a whole one.

    State: slots of the shape of each variable, 4 bytes a float32 parameter each: d; the
    preconditioner's; and the gradient before, unless the rule is Fletcher-Reeves and the
    preconditioner `"rms"` or `None`. And some scalars.

    >>> model.compile(optimizer=nlcg_tf.NLCG(learning_rate=0.1), loss="mse")

    A custom loop tells it the loss:

    >>> with tf.GradientTape() as tape:
    ...     loss = loss_fn(model(x, training=True), y)
    >>> optimizer.observe_loss(loss)
    >>> optimizer.apply(tape.gradient(loss, variables), variables)

    An update whose gradient, loss or step size is not finite is skipped: weights and state keep
    their bits, and `diagnostics()["skipped_updates"]` counts it. Under
    `gradient_accumulation_steps=k` one update of k micro-batches equals one of the whole batch:
    losses are averaged, schedules and EMA advance once an update.

    Args:
        learning_rate: float, a `LearningRateSchedule` (a step is an update), or a callable.
        update_rule: `"blended"`, `"fletcher_reeves"` or `"polak_ribiere"`.
        preconditioner: `"normalized_bfgs"`, `"bfgs"` (the paper's), `"rms"`, `None` (P g = g), or
            an object of `nlcg_tf.preconditioner` with settings of your own.
        line_search: `None`, `"online"` (the paper's), `"step"` (the released code's default), or
            an object of `nlcg_tf.line_search` with thresholds of your own.
        nesterov: bool. Whether the step looks ahead along the coming direction, as Keras'
            `SGD(nesterov=True)`.
        momentum: float in [0, 1), beta of gradients that are nothing but noise; for `"blended"`.
        epsilon: float, at least 1e-37; added to what gradients are divided by.
        lars_coefficient: float > 0 or `None`. If set, the step of each variable v is scaled by
            lars_coefficient * ||v|| / (||d_v|| + epsilon) (You et al. 2017), and by 1 where v is
            all zero, which would never leave zero otherwise.
        fused: `"auto"`: the fused op where it can be used, the update composed of Keras operations
            elsewhere (other backends, XLA, `tf.distribute` strategies, types other than float32 and
            float64, objects of your own, an op that is not built); `True`: raise where it cannot;
            `False`: composed. The logger "nlcg_tf" says at level DEBUG which path runs.
        name: string.
        **kwargs: every other argument of `keras.optimizers.Optimizer`, with its meaning.

    Raises:
        ValueError: for an argument outside its range; by a training step without a loss where the
            line search or the update rule needs one.
        RuntimeError: by a training step where `fused=True` cannot be met.
    """

    def __init__(
        self,
        learning_rate=0.1,
        update_rule="blended",
        preconditioner="normalized_bfgs",
        line_search=None,
        nesterov=True,
        momentum=0.9,
        epsilon=1e-8,
        lars_coefficient=None,
        fused="auto",
        name="nlcg",
        **kwargs,
    ):
        _check("update_rule", update_rule, list(direction.RULES))
        _check("nesterov", nesterov, [True, False])
        _check("fused", fused, ["auto", True, False])
        _check_number("momentum", momentum, 0, 1 - 1e-9)
        _check_number("epsilon", epsilon, 1e-37, 1e30)
        if lars_coefficient is not None:
            _check_number("lars_coefficient", lars_coefficient, 1e-300, 1e30)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.update_rule = update_rule
        self.preconditioner = preconditioners.get(preconditioner)
        self.line_search = line_searches.get(line_search)
        self.nesterov = nesterov
        self.momentum = momentum
        self.epsilon = epsilon
        self.lars_coefficient = lars_coefficient
        self.fused = fused
        self._uses_loss = self.line_search is not None or update_rule == "blended"
        if self._uses_loss:
            # A custom loop may observe a loss before the first update builds the slots.
            self.observed_loss = self._add_state("observed_loss", NO_LOSS, keras.config.floatx())
            self.update_loss = self.observed_loss
            if self.gradient_accumulation_steps:
                # The mean over the micro-steps whose gradients were applied.
                self.update_loss = self._add_state("update_loss", 0.0, keras.config.floatx())
        self._pending_loss = None
        self._loss_is_known = self._loss_comes_from_graph = False
        self._count_without_slots = len(self.variables)

    def build(self, var_list):
        """Creates the slots, tensors of the shape of each variable, and scalars."""
        if self.built:
            return
        super().build(var_list)
        self.compute_dtype = keras.backend.result_type(
            *{keras.backend.standardize_dtype(v.dtype) for v in var_list}, "float32"
        )
        initial = dict(self.preconditioner.initial_state()) if self.preconditioner else {}
        if taken := {"direction", "previous_gradient"} & set(initial):
            raise ValueError(
                f"`preconditioner` has slots of the optimizer's own name: {', '.join(taken)}. "
                f"Received: preconditioner={self.preconditioner!r}"
            )
        initial["direction"] = 0.0
        uses_steps = preconditioners.uses_steps(self.preconditioner)
        if uses_steps or self.update_rule != "fletcher_reeves":
            initial["previous_gradient"] = 0.0
        self.slots = {
            name: self.add_optimizer_variables(var_list, name, keras.initializers.Constant(value))
            for name, value in initial.items()
        }
        if uses_steps and not self.nesterov:
            # For each variable sum(g_prev d) and sum(d h d) of its last update, each in two parts
            # of this type that make up a double. Only the fused op keeps them; -1: not known.
            self.curvature_sums = self._add_state(
                "curvature_sums", np.full((len(var_list), 4), -1.0), self.compute_dtype
            )
        if self.lars_coefficient:
            self.trust_ratios = self.add_variable(
                (len(var_list),), initializer="ones", dtype=self.compute_dtype, name="trust_ratios"
            )
        # Scalars lie together in two vectors: one to read, and one kernel to write, not a dozen.
        state = self.line_search.initial_state() if self.line_search else {}
        self.real_names = [*REALS, *state]
        initial = [*[0.0] * len(REALS), *state.values()]
        self.reals = self._add_state("reals", initial, self.compute_dtype)
        self.counts = self._add_state("counts", [0] * len(COUNTS), "int")

    def _add_state(self, name, values, dtype):
        return self.add_variable(
            np.shape(values),
            initializer=lambda shape, dtype: ops.convert_to_tensor(values, dtype),
            dtype=dtype,
            aggregation="only_first_replica",
            name=name,
        )

    def observe_loss(self, loss):
        """Tells the optimizer the loss of the coming update.

        For custom training loops, before `apply` or `apply_gradients`; `fit` does it by itself.
        Under `gradient_accumulation_steps` call it on each micro-batch: the losses are averaged.
        Under a `tf.distribute` strategy call it in the replica context, with the loss already
        divided by the number of replicas, as its gradient must be.

        Args:
            loss: scalar tensor or float. With several Horovod workers, this worker's own mean.

        Raises:
            ValueError: if `loss` is not a scalar.
        """
        if not self._uses_loss:
            return
        loss = ops.stop_gradient(ops.cast(loss, self.observed_loss.dtype))
        if len(loss.shape) != 0:
            raise ValueError(f"`loss` must be a scalar. Received: shape={tuple(loss.shape)}")
        if keras.backend.backend() == "tensorflow":
            from nlcg_tf import replicas

            self.observed_loss.assign(replicas.sum_over_replicas([loss])[0])
            # What is traced once runs many times: from then on a graph brings the losses.
            self._loss_comes_from_graph |= replicas.is_tracing()
        else:
            # A stateless training step keeps no assignment made outside `stateless_apply`.
            self._pending_loss = loss
        self._loss_is_known = True

    def scale_loss(self, loss):
        """Keras' hook before the gradients are computed: here the optimizer sees the loss."""
        self.observe_loss(loss)
        return super().scale_loss(loss)

    def apply(self, grads, trainable_variables=None):
        """Does one update; see `keras.optimizers.Optimizer.apply`.

        Raises:
            ValueError: if no loss was observed since the last call, and the line search or
                the update rule needs one. (In a graph that was traced before, such an update is
                skipped.)
        """
        if not self._uses_loss:
            super().apply(grads, trainable_variables)
            return
        self._check_loss()
        if self._pending_loss is not None:
            loss, self._pending_loss = self._pending_loss, None
            self.observed_loss.assign(loss)
        if self.update_loss is not self.observed_loss:
            # Here, not where it is observed: loss scaling may drop a micro-step in between.
            position = ops.cast(self._micro_step(), self.update_loss.dtype)
            loss = ops.convert_to_tensor(self.observed_loss)
            mean = self.update_loss + (loss - self.update_loss) / (position + 1)
            self.update_loss.assign(ops.where(position == 0, loss, mean))
        super().apply(grads, trainable_variables)
        self.observed_loss.assign(ops.full((), NO_LOSS, self.observed_loss.dtype))

    def _check_loss(self):
        known, self._loss_is_known = self._loss_is_known, False
        if not known and self._loss_comes_from_graph:
            # A call of the graph leaves nothing in Python.
            from nlcg_tf import replicas

            known = replicas.is_tracing() or self.observed_loss.numpy() != NO_LOSS
        if not known:
            raise ValueError(
                "NLCG has not seen the loss of this update. Call `optimizer.observe_loss(loss)` "
                "before the gradients are applied. Without a loss work "
                "`update_rule='fletcher_reeves'` or 'polak_ribiere' with `line_search=None`. "
                f"Received: update_rule={self.update_rule!r}, line_search={self.line_search!r}"
            )

    def _apply_weight_decay(self, variables):
        """Left to the update, so that a skipped update leaves the weights alone."""

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        positions = [self._get_variable_index(v) for v in trainable_variables]
        weight_decays = [
            self.weight_decay if self.weight_decay and self._use_weight_decay(v) else 0.0
            for v in trainable_variables
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
            from nlcg_tf import replicas

            gradients = replicas.sum_over_replicas(grads)
            replicas.update_each(update, [*gradients, learning_rate], variables)
        else:
            update([*grads, learning_rate], variables)

    def _path(self, weights):
        """The module that does this update: `nlcg_tf.fused` where it can, or `nlcg_tf.composed`."""
        if self.fused is False:
            return composed
        reason = fused.why_not(self, weights)
        if self.fused is True and reason:
            raise RuntimeError(f"`fused=True`: {reason}")
        logger.debug("NLCG update: %s", f"composed path, {reason}" if reason else "fused op")
        return composed if reason else fused

    def _update_flags(self):
        is_update, _ = super()._update_flags()
        counts = dict(zip(COUNTS, ops.unstack(ops.convert_to_tensor(self.counts), len(COUNTS))))
        return is_update & (counts["last_update_applied"] == 1), counts["updates"] == 1

    def diagnostics(self):
        """What the last update did, as Python floats.

        Returns:
            dict with "beta"; "step_size" (learning rate times scale, and with `"blended"` times the
            factor of the gradients' length); "learning_rate_scale" (1 without a line search);
            "curvature" (y^T s, with BFGS); "cosine" of the angle between the step and the negative
            gradient; "kappa" (with `"blended"`); "preconditioner_mean" (the harmonic mean of h with
            BFGS, which should stay within some powers of ten; ||g|| / ||q|| with RMS; else 1); and
            the counts "updates", "skipped_updates" and "rejected_curvatures" (updates whose y^T s
            was not positive). All zero before the first update, but for the scale.
        """
        shown = (*REALS[1:7], "learning_rate_scale", *COUNTS[:3])
        values = dict.fromkeys(shown, 0.0) | {"learning_rate_scale": 1.0}
        if self.built:
            values.update(zip(self.real_names, ops.convert_to_numpy(self.reals).tolist()))
            values.update(zip(COUNTS, ops.convert_to_numpy(self.counts).tolist()))
        return {name: float(values[name]) for name in shown}

    def save_own_variables(self, store):
        """Stores the variables, and which settings they belong to."""
        super().save_own_variables(store)
        store["layout"] = np.frombuffer(json.dumps(self._layout()).encode(), np.uint8)

    def _layout(self):
        """The settings that decide which variables there are and what they mean."""
        names = {
            name: type(getattr(self, name)).__name__ for name in ("preconditioner", "line_search")
        }
        return {
            **names,
            "slots": [*self.slots] if self.built else [],
            "nesterov": self.nesterov,
            "lars_coefficient": self.lars_coefficient is not None,
            "use_ema": self.use_ema,
            "gradient_accumulation_steps": bool(self.gradient_accumulation_steps),
        }

    def load_own_variables(self, store):
        """Restores the optimizer from a saved model.

        An optimizer without slots yet, or a file without optimizer state, is what Keras makes of
        it: a warning, and the weights alone are loaded.

        Raises:
            ValueError: if the saved state is of other settings, where Keras would only warn or
                take one variable for another.
        """
        saved = {name: store[name] for name in store.keys() if name != "layout"}
        if self.built and len(saved) == self._count_without_slots:
            # Saved before the first update: there are no slots to restore.
            for i, variable in enumerate(self.variables[: self._count_without_slots]):
                variable.assign(saved[str(i)])
            return
        if self.built and saved:
            self._check_layout(store, len(saved))
        super().load_own_variables(saved)

    def _check_layout(self, store, count):
        if "layout" not in store.keys():
            raise ValueError(
                f"The saved state of optimizer '{self.name}' does not say which settings it "
                "belongs to: an older version of nlcg_tf saved it, or another optimizer."
            )
        layout, own = json.loads(np.asarray(store["layout"]).tobytes()), self._layout()
        other = [
            f"{name}: saved {layout.get(name)!r}, wanted {own[name]!r}"
            for name in own
            if layout.get(name) != own[name]
        ]
        if count != len(self.variables):
            other.append(f"variables: saved {count}, wanted {len(self.variables)}")
        if other:
            raise ValueError(
                f"The saved state of optimizer '{self.name}' is of other settings: "
                + "; ".join(other)
            )

    def get_config(self):
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
    def from_config(cls, config, custom_objects=None):
        """The reverse of `get_config`; `custom_objects` maps names to classes of your own."""
        with keras.saving.custom_object_scope(custom_objects or {}):
            return super().from_config(dict(config), custom_objects)


def _check(name, value, choices):
    if not any(value is choice or (value == choice and type(value) is str) for choice in choices):
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {options}. Received: {name}={value!r}")


def _check_number(name, value, least, most):
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid or not least <= value <= most:
        raise ValueError(
            f"`{name}` must be a number between {least} and {most}. Received: {name}={value!r}"
        )
