"""The NLCG optimizer (Adya, Palakkode & Tuzel 2018, arXiv 1812.02886)."""

import logging
import numbers

import keras
import numpy as np
from keras import ops

from nlcg_tf import composed, direction, fused, loss_scaling
from nlcg_tf import line_search as line_searches
from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.composed import COUNTS, REALS

loss_scaling.forward_loss_to_inner_optimizer()
logger = logging.getLogger("nlcg_tf")


@keras.saving.register_keras_serializable(package="nlcg_tf")
class NLCG(CountsUpdates, keras.optimizers.Optimizer):
    """Preconditioned nonlinear conjugate gradients with an online stochastic line search.

    The whole weight vector w (all trainable variables together) moves along a conjugate direction d
    of the preconditioned gradient (Algorithm 1 of the paper). One update with gradient g:

        y = g - g_prev,  s = alpha_prev d                      the last step and what it changed
        h = |h - (h s)^2 / (s^T h s) + y^2 / (y^T s)|          diagonal BFGS, if y^T s > epsilon
        z = -g / (h + epsilon),  delta_new = -g^T z
        beta = delta_new / delta                               Fletcher-Reeves
        beta = (delta_new + z_prev^T g) / delta                Polak-Ribiere
        d = z + clip(beta, 0, 1) d,  delta = delta_new
        alpha = learning_rate * learning_rate_scale            the scale follows the loss
        w = w + alpha d

    The absolute value and the guard on y^T s come from the authors' released code. State: three
    slots of the shape of each variable (12 bytes a float32 parameter) and a few scalars.

    >>> model.compile(optimizer=nlcg_tf.NLCG(learning_rate=0.1), loss="mse")

    A custom loop tells the loss to the line search:

    >>> with tf.GradientTape() as tape:
    ...     loss = loss_fn(model(x, training=True), y)
    >>> optimizer.observe_loss(loss)
    >>> optimizer.apply(tape.gradient(loss, variables), variables)

    An update whose gradient, loss or step size is not finite is skipped: weights and state keep
    their bits, and `diagnostics()["skipped_updates"]` counts it. Under
    `gradient_accumulation_steps=k` one update of k micro-batches equals one of the whole batch:
    losses are averaged, schedules and EMA advance once an update.

    Args:
        learning_rate: float, a `LearningRateSchedule` (a step is an update), or a callable. The
            largest step size; the line search scales it down.
        update_rule: `"fletcher_reeves"` or `"polak_ribiere"`.
        preconditioner: `"bfgs"`, or `None` for h = 1.
        line_search: `"online"` (the paper's), `"step"` (the released code's default), `None`, or an
            object of `nlcg_tf.line_search` with thresholds of your own.
        epsilon: float, at least 1e-37; added to denominators, and the least trusted curvature.
        lars_coefficient: float > 0 or `None`. If set, the step of each variable v is scaled by
            lars_coefficient * ||v|| / (||d_v|| + epsilon) (You et al. 2017), and by 1 where v is
            all zero, which would never leave zero otherwise.
        fused: `"auto"`: the fused op where it can be used, the update composed of Keras operations
            elsewhere (other backends, XLA, `tf.distribute` strategies, types other than float32 and
            float64, an op that is not built); `True`: raise where it cannot; `False`: composed. The
            logger "nlcg_tf" says at level DEBUG which path runs.
        name: string.
        **kwargs: every other argument of `keras.optimizers.Optimizer`, with its meaning.

    Raises:
        ValueError: for an argument outside its range; by a training step without a loss while a
            line search is on.
        RuntimeError: by a training step where `fused=True` cannot be met.
    """

    def __init__(
        self,
        learning_rate=0.1,
        update_rule="fletcher_reeves",
        preconditioner="bfgs",
        line_search="online",
        epsilon=1e-8,
        lars_coefficient=None,
        fused="auto",
        name="nlcg",
        **kwargs,
    ):
        _check("update_rule", update_rule, list(direction.RULES))
        _check("preconditioner", preconditioner, ["bfgs", None])
        _check("fused", fused, ["auto", True, False])
        _check_positive("epsilon", epsilon, at_least=1e-37)
        if lars_coefficient is not None:
            _check_positive("lars_coefficient", lars_coefficient)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.update_rule = update_rule
        self.preconditioner = preconditioner
        self.line_search = line_searches.get(line_search)
        self.epsilon = epsilon
        self.lars_coefficient = lars_coefficient
        self.fused = fused
        if self.line_search is not None:
            # A custom loop may observe a loss before the first update builds the slots.
            self.observed_loss = self._add_state("observed_loss", 0.0, keras.config.floatx())
        self._pending_loss = None
        self._loss_is_known = self._loss_comes_from_graph = False
        self._count_without_slots = len(self.variables)

    def build(self, var_list):
        """Creates the slots: three of the shape of each variable, and scalars."""
        if self.built:
            return
        super().build(var_list)
        self.compute_dtype = keras.backend.result_type(
            *{keras.backend.standardize_dtype(v.dtype) for v in var_list}, "float32"
        )
        self.slots = {
            name: self.add_optimizer_variables(var_list, name)
            for name in ("direction", "previous_gradient")
        }
        if self.preconditioner:
            self.slots["hessian_diagonal"] = self.add_optimizer_variables(
                var_list, "hessian_diagonal", initializer="ones"
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
        """Tells the line search the loss of the coming update.

        For custom training loops, before `apply` or `apply_gradients`; `fit` does it by itself.
        Under `gradient_accumulation_steps` call it on each micro-batch: the losses are averaged.
        Under a `tf.distribute` strategy call it in the replica context, with the loss already
        divided by the number of replicas, as its gradient must be.

        Args:
            loss: scalar tensor or float. With several Horovod workers, this worker's own mean.

        Raises:
            ValueError: if `loss` is not a scalar.
        """
        if self.line_search is None:
            return
        loss = ops.stop_gradient(ops.cast(loss, self.observed_loss.dtype))
        if len(loss.shape) != 0:
            raise ValueError(f"`loss` must be a scalar. Received: shape={tuple(loss.shape)}")
        if keras.backend.backend() == "tensorflow":
            from nlcg_tf import replicas

            self._store_loss(replicas.sum_over_replicas([loss])[0])
            # What is traced once runs many times: from then on a graph brings the losses.
            self._loss_comes_from_graph |= replicas.is_tracing()
        else:
            # A stateless training step keeps no assignment made outside `stateless_apply`.
            self._pending_loss = loss
        self._loss_is_known = True

    def _store_loss(self, loss):
        position = ops.cast(self._micro_step(), loss.dtype)
        mean = self.observed_loss + (loss - self.observed_loss) / (position + 1)
        self.observed_loss.assign(ops.where(position == 0, loss, mean))

    def scale_loss(self, loss):
        """Keras' hook before the gradients are computed: here the optimizer sees the loss."""
        self.observe_loss(loss)
        return super().scale_loss(loss)

    def apply(self, grads, trainable_variables=None):
        """Does one update; see `keras.optimizers.Optimizer.apply`.

        Raises:
            ValueError: if a line search is on and no loss was observed since the last call.
        """
        if self.line_search is not None:
            if not (self._loss_is_known or self._loss_comes_from_graph):
                raise ValueError(
                    "NLCG's line search has not seen the loss of this update. Call "
                    "`optimizer.observe_loss(loss)` before the gradients are applied, or turn it "
                    "off with `line_search=None`."
                )
            self._loss_is_known = False
            if self._pending_loss is not None:
                loss, self._pending_loss = self._pending_loss, None
                self._store_loss(loss)
        super().apply(grads, trainable_variables)

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
        for name, slot in self.slots.items():
            variables[name] = [slot[i] for i in positions]
        if self.lars_coefficient:
            variables["trust_ratios"] = self.trust_ratios
        if self.line_search is not None:
            variables["loss"] = self.observed_loss

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
            dict with "beta"; "step_size" (learning rate times scale); "learning_rate_scale" (1
            without a line search); "curvature" (y^T s); "cosine" of the angle between the direction
            and the negative gradient; and the counts "updates", "skipped_updates" and
            "rejected_curvatures" (updates whose y^T s was too small to be trusted). All zero before
            the first update, but for the scale.
        """
        shown = ("beta", "step_size", "learning_rate_scale", "curvature", "cosine", *COUNTS[:3])
        values = {name: 0.0 for name in shown} | {"learning_rate_scale": 1.0}
        if self.built:
            values.update(zip(self.real_names, ops.convert_to_numpy(self.reals).tolist()))
            values.update(zip(COUNTS, ops.convert_to_numpy(self.counts).tolist()))
        return {name: float(values[name]) for name in shown}

    def load_own_variables(self, store):
        """Restores the optimizer from a saved model.

        An optimizer without slots yet, or a file without optimizer state, is what Keras makes of
        it: a warning, and the weights alone are loaded.

        Raises:
            ValueError: if the saved state does not fit, where Keras would only warn.
        """
        if self.built and len(store.keys()) == self._count_without_slots:
            # Saved before the first update: there are no slots to restore.
            for i, variable in enumerate(self.variables[: self._count_without_slots]):
                variable.assign(store[str(i)])
            return
        if self.built and store.keys() and len(store.keys()) != len(self.variables):
            raise ValueError(
                f"The saved state of optimizer '{self.name}' has {len(store.keys())} variables, "
                f"but this optimizer has {len(self.variables)}. Were update_rule, preconditioner, "
                "line_search, lars_coefficient, use_ema, gradient_accumulation_steps and the "
                "trainable variables the same when it was saved?"
            )
        super().load_own_variables(store)

    def get_config(self):
        config = super().get_config()
        config.update(
            update_rule=self.update_rule,
            preconditioner=self.preconditioner,
            line_search=self.line_search and keras.saving.serialize_keras_object(self.line_search),
            epsilon=self.epsilon,
            lars_coefficient=self.lars_coefficient,
            fused=self.fused,
        )
        return config


def _check(name, value, choices):
    if not any(value is choice or (value == choice and type(value) is str) for choice in choices):
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {options}. Received: {name}={value!r}")


def _check_positive(name, value, at_least=1e-300):
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not valid or not at_least <= value < 1e30:
        raise ValueError(
            f"`{name}` must be a number between {at_least} and 1e30. Received: {name}={value!r}"
        )
