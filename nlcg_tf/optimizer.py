"""The NLCG optimizer (Adya, Palakkode & Tuzel 2018, arXiv 1812.02886), composed of `keras.ops`."""

import keras
import numpy as np
from keras import ops

from nlcg_tf import direction, loss_scaling, preconditioner
from nlcg_tf import line_search as line_searches
from nlcg_tf.accumulation import CountsUpdates
from nlcg_tf.reductions import all_finite, dot, total

loss_scaling.forward_loss_to_inner_optimizer()

# What the vectors of scalars hold; the state of the line search follows in `reals`.
REALS = ("delta", "step_size", "beta", "curvature", "cosine")
COUNTS = ("updates", "skipped_updates", "rejected_curvatures", "last_update_applied")


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
        epsilon: float > 0, added to denominators and the least curvature that is trusted.
        lars_coefficient: float > 0 or `None`. If set, the step of each variable v is scaled by
            lars_coefficient * ||v|| / (||d_v|| + epsilon) (You et al. 2017), and by 1 where v is
            all zero, which would never leave zero otherwise.
        fused: `"auto"`, `True` or `False`: whether to use the fused op. This version has none:
            `True` raises.
        name: string.
        **kwargs: every other argument of `keras.optimizers.Optimizer`, with its meaning.

    Raises:
        ValueError: for an argument outside its range; by a training step without a loss while a
            line search is on.
        RuntimeError: for `fused=True`.
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
        _check_positive("epsilon", epsilon)
        if lars_coefficient is not None:
            _check_positive("lars_coefficient", lars_coefficient)
        if fused is True:
            raise RuntimeError(
                "`fused=True`: this version of nlcg_tf has no fused op. "
                "Use fused='auto' or fused=False."
            )
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
        self._loss_is_known = False

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
        self._reals = [*REALS, *state]
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
        """
        if self.line_search is None:
            return
        loss = ops.stop_gradient(ops.cast(loss, self.observed_loss.dtype))
        if keras.backend.backend() == "tensorflow":
            from nlcg_tf.replicas import sum_over_replicas

            self._store_loss(sum_over_replicas([loss])[0])
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
            if not self._loss_is_known:
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
        indices = [self._get_variable_index(v) for v in trainable_variables]
        decays = [
            self.weight_decay if self.weight_decay and self._use_weight_decay(v) else None
            for v in trainable_variables
        ]
        variables = {
            "weights": list(trainable_variables),
            "reals": self.reals,
            "counts": self.counts,
        }
        for name, slot in self.slots.items():
            variables[name] = [slot[i] for i in indices]
        if self.lars_coefficient:
            variables["trust_ratios"] = self.trust_ratios
        if self.line_search is not None:
            variables["loss"] = self.observed_loss

        learning_rate = ops.convert_to_tensor(learning_rate)

        def update(tensors, variables):
            self._update(tensors[:-1], variables, tensors[-1], indices, decays)

        if keras.backend.backend() == "tensorflow":
            from nlcg_tf import replicas

            gradients = replicas.sum_over_replicas(grads)
            replicas.update_each(update, [*gradients, learning_rate], variables)
        else:
            update([*grads, learning_rate], variables)

    def _update(self, gradients, variables, learning_rate, indices, decays):
        """One update of section 2 of the paper: reads the variables, computes, assigns."""

        def read(xs):
            return [ops.cast(x, self.compute_dtype) for x in xs]

        epsilon = self.epsilon
        g, w = read(gradients), read(variables["weights"])
        d, g_prev = read(variables["direction"]), read(variables["previous_gradient"])
        reals, counts = variables["reals"], variables["counts"]
        old = dict(zip(self._reals, ops.unstack(ops.convert_to_tensor(reals), len(self._reals))))
        old.update(zip(COUNTS, ops.unstack(ops.convert_to_tensor(counts), len(COUNTS))))
        learning_rate = ops.cast(learning_rate, self.compute_dtype)
        updates = old["updates"]
        first = updates == 0

        # Preconditioner
        if self.preconditioner:
            h_before = read(variables["hessian_diagonal"])
            ratios = self._trust_ratios(variables, indices)
            y = [g_i - p_i for g_i, p_i in zip(g, g_prev)]
            s = [old["step_size"] * r_i * d_i for r_i, d_i in zip(ratios, d)]
            h, curvature, accepted = preconditioner.bfgs(h_before, y, s, epsilon)
        else:
            h_before = h = [ops.ones_like(w_i) for w_i in w]
            curvature, accepted = ops.zeros_like(old["curvature"]), True

        # Direction
        z = [-g_i / (h_i + epsilon) for g_i, h_i in zip(g, h)]
        delta_new = -dot(g, z)
        delta_mid = None
        if self.update_rule == "polak_ribiere":
            delta_mid = dot(g, [p_i / (h_i + epsilon) for p_i, h_i in zip(g_prev, h_before)])
        beta = direction.RULES[self.update_rule](delta_new, delta_mid, old["delta"], epsilon)
        beta = ops.where(first, ops.zeros_like(beta), beta)
        d_new = [z_i + beta * d_i for z_i, d_i in zip(z, d)]

        # Line search
        new, scale, finite = {}, 1.0, []
        if self.line_search is not None:
            loss = ops.cast(variables["loss"], self.compute_dtype)
            new = self.line_search.update(
                {name: old[name] for name in self.line_search.initial_state()}, loss, updates
            )
            scale, finite = new["learning_rate_scale"], [loss]

        # Step
        alpha = learning_rate * scale
        if self.lars_coefficient:
            ratios = [self._trust_ratio(w_i, d_i) for w_i, d_i in zip(w, d_new)]
            steps = [alpha * r_i for r_i in ratios]
        else:
            steps = [alpha] * len(w)
        w_new = [
            (w_i if decay is None else w_i - w_i * decay * learning_rate) + step_i * d_i
            for w_i, d_i, step_i, decay in zip(w, d_new, steps, decays)
        ]

        applied = all_finite([*g, *finite, alpha])
        keep = ops.logical_not(applied)

        def assign(variable, value):
            value = ops.cast(value, variable.dtype)
            variable.assign(ops.where(applied, value, ops.convert_to_tensor(variable)))

        slots = {"weights": w_new, "direction": d_new, "previous_gradient": g}
        if self.preconditioner:
            slots["hessian_diagonal"] = h
        for name, values in slots.items():
            for variable, value in zip(variables[name], values):
                assign(variable, value)
        if self.lars_coefficient:
            by_index = dict(zip(indices, ratios))
            rows = [by_index.get(i, row) for i, row in enumerate(ops.unstack(self.trust_ratios))]
            assign(variables["trust_ratios"], ops.stack(rows))
        new.update(
            delta=delta_new,
            step_size=alpha,
            beta=beta,
            curvature=curvature,
            cosine=_cosine(g, d_new),
        )
        assign(reals, ops.stack([new[name] for name in self._reals]))
        rejected = ops.logical_not(first | accepted)
        done = {"updates": applied, "skipped_updates": keep}
        done["rejected_curvatures"] = applied & rejected
        changes = {name: ops.cast(flag, updates.dtype) for name, flag in done.items()}
        new = {name: old[name] + change for name, change in changes.items()}
        new["last_update_applied"] = changes["updates"]
        counts.assign(ops.stack([new[name] for name in COUNTS]))

    def _trust_ratios(self, variables, indices):
        if not self.lars_coefficient:
            return [1.0] * len(indices)
        rows = ops.unstack(ops.convert_to_tensor(variables["trust_ratios"]))
        return [rows[i] for i in indices]

    def _trust_ratio(self, w, d):
        norm = ops.sqrt(total(w * w))
        ratio = self.lars_coefficient * norm / (ops.sqrt(total(d * d)) + self.epsilon)
        return ops.where(norm > 0, ratio, ops.ones_like(ratio))

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
            values.update(zip(self._reals, ops.convert_to_numpy(self.reals).tolist()))
            values.update(zip(COUNTS, ops.convert_to_numpy(self.counts).tolist()))
        return {name: float(values[name]) for name in shown}

    def load_own_variables(self, store):
        """Restores the optimizer from a saved model.

        Raises:
            ValueError: if the saved state does not fit, where Keras would only warn.
        """
        if len(store.keys()) != len(self.variables):
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


def _cosine(g, d):
    norms = ops.sqrt(dot(g, g)) * ops.sqrt(dot(d, d))
    return ops.where(norms > 0, -dot(g, d) / norms, ops.zeros_like(norms))


def _check(name, value, choices):
    if value not in choices:
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {options}. Received: {name}={value!r}")


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
