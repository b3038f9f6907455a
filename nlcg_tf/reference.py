"""The reference update, in `keras.ops`: the specification, and the path for every backend.

One update with gradient g and loss f, in this order:

    alpha = learning_rate line_search(f)                     begin
    s = the last step,  y = g - g_prev                       finish_curvature
    r = gain_ratio(f, f_prev, g, g_prev, s)
    P = preconditioner.update(g, y, s, r)
    z = -P g                                                 finish_direction
    delta_new = g^T P g
    beta = r clip(delta_new / delta, 0, 1) + (1 - r) momentum
    d = z + beta d
    step = d + (1 - r) (z + beta d - d)                      look-ahead
    alpha = alpha (||g_first|| / ||g||)^(1 - r)              gradient-norm normalization
    step, d = step, d shortened to twice the mean norm       update clipping
    w = w + alpha step, kernels shortened if P limits norms  finish_step

That is the rule `"blended"` with a look-ahead. The others leave out the gain ratio (r = 0), the
last two bounds on the length, and have a beta of their own.

Source: Adya, Palakkode & Tuzel 2018, arXiv 1812.02886, Algorithm 1 and section 3.2.
"""

from keras import ops

from nlcg_tf import checked, direction, noise
from nlcg_tf.preconditioner import Preconditioner, limited, norm_limits
from nlcg_tf.reductions import total

# What the optimizer's two vectors of scalars hold; in `reals` the line search's state follows.
REALS = ["delta", "step_size", "beta", "curvature", "cosine", "gain_ratio", "preconditioner_mean"]
REALS += ["last_loss", "prediction_error", "predicted_change"]
REALS += ["mean_squared_norm", "first_squared_norm", "mean_update_norm", "clip_factor"]
# The slots that are not the preconditioner's.
OWN_SLOTS = ("direction", "previous_gradient", "previous_preconditioned")
COUNTS = ("updates", "skipped_updates", "rejected_curvatures", "last_update_applied")


def update(optimizer, gradients, learning_rate, variables, positions, weight_decays):
    """Reads the variables, computes one update, assigns.

    Args:
        optimizer: the `NLCG`, of which only the settings are read.
        gradients: list of tensors, one for each of the weights.
        learning_rate: scalar tensor.
        variables: dict of variables: lists "weights" and, by their names, "slots"; vectors "reals",
            "counts" and, with LARS scaling, "trust_ratios"; the scalar "loss" where the settings
            need it; "curvature_sums" where the fused op can make use of them.
        positions: list of ints, where each of the weights stands in "trust_ratios".
        weight_decays: list of floats.
    """
    stages = Stages(optimizer, gradients, learning_rate, variables, positions)
    stages.begin()
    stages.finish_curvature()
    stages.finish_direction()
    stages.finish_step(weight_decays)
    stages.assign(variables)


class Stages:
    """One update; its stages have the names of those in nlcg_update_stages.h.

    Attributes that they leave to each other: `old` and `new`, dicts of the scalars; `w`, `g`, `d`,
    lists of tensors, one for each of the weights; `step`, the step without its size `alpha`.
    """

    def __init__(self, optimizer, gradients, learning_rate, variables, positions):
        dtype = optimizer.compute_dtype

        def read(xs):
            return [None if x is None else ops.cast(x, dtype) for x in xs]

        self.optimizer = optimizer
        self.preconditioner = optimizer.preconditioner or Preconditioner()
        self.sums = optimizer.sums
        self.blends = optimizer.update_rule == "blended"
        self.old = dict(zip(optimizer.real_names, _unstack(variables["reals"])))
        self.old.update(zip(COUNTS, _unstack(variables["counts"])))
        self.first = self.old["updates"] == 0
        self.learning_rate = ops.cast(learning_rate, dtype)
        self.loss = ops.cast(variables["loss"], dtype) if "loss" in variables else None
        self.g, self.w = read(gradients), read(variables["weights"])
        slots = {name: read(slot) for name, slot in variables["slots"].items()}
        self.d, self.g_prev = slots["direction"], slots.get("previous_gradient")
        self.kept_before = slots.get("previous_preconditioned")
        self.state = {name: x for name, x in slots.items() if name not in OWN_SLOTS}
        # What the preconditioner sees of the weights.
        self.weights = self.w if self.preconditioner.uses_weights else None
        self.positions = positions
        if optimizer.lars_coefficient:
            self.ratio_rows = _unstack(variables["trust_ratios"])
        self.new = {name: self.old[name] for name in REALS}
        self.new["clip_factor"] = ops.ones_like(self.old["clip_factor"])

    def begin(self):
        """The line search and the step size: section 3.2.2."""
        self.alpha, search = self.learning_rate, self.optimizer.line_search
        if search is not None:
            state = {name: self.old[name] for name in search.initial_state()}
            updates = self.old["updates"]
            self.new.update(checked.update_line_search(search, state, self.loss, updates))
            self.alpha = self.learning_rate * self.new["learning_rate_scale"]

    def finish_curvature(self):
        """What the last step tells: its curvature, the gain ratio, the preconditioner's state."""
        old, y, s = self.old, None, None
        curvature, gain_ratio = ops.zeros_like(self.alpha), ops.zeros_like(self.alpha)
        needs_step = self.preconditioner.uses_steps or self.blends
        self.preconditioned_before = before = None
        if self.optimizer.update_rule == "polak_ribiere" or (
            needs_step and self.optimizer.nesterov
        ):
            before = self.kept_before
            if before is None:
                before, _ = self._precondition(self.g_prev, None)
            self.preconditioned_before = before
        if needs_step:
            step = self._look_ahead(
                before, self.d, old["beta"], old["gain_ratio"], old["clip_factor"]
            )
            sizes = [old["step_size"]] * len(self.w)
            if self.optimizer.lars_coefficient:
                sizes = [old["step_size"] * self.ratio_rows[i] for i in self.positions]
            y = [g_i - p_i for g_i, p_i in zip(self.g, self.g_prev)]
            s = [size_i * step_i for size_i, step_i in zip(sizes, step)]
        if self.preconditioner.uses_steps:
            curvature = self.sums.dot(y, s)
        if self.blends:
            slopes = self.sums.dot(self.g, s), self.sums.dot(self.g_prev, s)
            means = old["prediction_error"], old["predicted_change"]
            gain_ratio, prediction_error, predicted_change = noise.measure_gain_ratio(
                self.loss, old["last_loss"], *slopes, *means, old["updates"]
            )
            self.new.update(
                last_loss=self.loss,
                prediction_error=prediction_error,
                predicted_change=predicted_change,
            )
        self.state, self.accepted = checked.update_preconditioner(
            self.preconditioner, self.state, self.g, self.weights, y, s, gain_ratio, self.sums
        )
        self.new.update(curvature=curvature, gain_ratio=gain_ratio)

    def finish_direction(self):
        """beta and the direction; with the blended rule the length of the step."""
        old, optimizer, gain_ratio = self.old, self.optimizer, self.new["gain_ratio"]
        self.preconditioned, mean = self._precondition(self.g, self.weights)
        delta_new = self.sums.dot(self.g, self.preconditioned)
        if self.blends:
            beta = direction.blended(delta_new, old["delta"], gain_ratio, optimizer.momentum)
        elif optimizer.update_rule == "polak_ribiere":
            delta_mid = self.sums.dot(self.g, self.preconditioned_before)
            beta = direction.polak_ribiere(delta_new, delta_mid, old["delta"])
        else:
            beta = direction.fletcher_reeves(delta_new, old["delta"])
        beta = ops.where(self.first, ops.zeros_like(beta), beta)
        if optimizer.update_rule == "momentum":
            beta = ops.full_like(delta_new, optimizer.momentum)
        self.d = [beta * d_i - pg_i for pg_i, d_i in zip(self.preconditioned, self.d)]
        self.step = self._look_ahead(self.preconditioned, self.d, beta, gain_ratio)
        if self.blends:
            self._set_length()
        self.new.update(delta=delta_new, step_size=self.alpha, beta=beta, preconditioner_mean=mean)

    def _precondition(self, g, w):
        return checked.apply_preconditioner(
            self.preconditioner, self.state, g, w, self.optimizer.epsilon, self.sums
        )

    def _look_ahead(self, preconditioned, d, beta, gain_ratio, clip_factor=1.0):
        """d, or with Nesterov's look-ahead z + beta d as far as gradients are noise."""
        if not self.optimizer.nesterov:
            return d
        look_ahead = 1 - gain_ratio
        of_d, of_pg = 1 - look_ahead + look_ahead * beta, look_ahead * clip_factor
        return [of_d * d_i - x for x, d_i in zip(_shortened(of_pg, preconditioned), d)]

    def _set_length(self):
        """Gradient-norm normalization and update clipping."""
        old, new = self.old, self.new
        square = self.sums.dot(self.g, self.g)
        means = old["mean_squared_norm"], old["first_squared_norm"]
        factor, mean_squared_norm, first = noise.norm_factor(square, *means, new["gain_ratio"])
        norm = factor * ops.sqrt(self.sums.dot(self.step, self.step))
        momentum = self.optimizer.momentum
        clip_factor, mean_update_norm = noise.update_clip(norm, old["mean_update_norm"], momentum)
        self.d, self.step = _shortened(clip_factor, self.d), _shortened(clip_factor, self.step)
        alpha = self.alpha * factor
        self.alpha = ops.where(ops.isfinite(alpha), alpha, self.alpha)
        new.update(mean_squared_norm=mean_squared_norm, first_squared_norm=first)
        new.update(mean_update_norm=mean_update_norm, clip_factor=clip_factor)

    def finish_step(self, weight_decays):
        """The new weights, and whether everything is finite."""
        sizes = [self.alpha] * len(self.w)
        if self.optimizer.lars_coefficient:
            pairs = zip(self.w, self.step)
            self.ratios = [_trust_ratio(self.optimizer, w_i, step_i) for w_i, step_i in pairs]
            sizes = [self.alpha * ratio for ratio in self.ratios]
        before = self.w
        self.w = [
            (w_i - w_i * decay * self.learning_rate if decay else w_i) + size_i * step_i
            for w_i, step_i, size_i, decay in zip(self.w, self.step, sizes, weight_decays)
        ]
        if self.preconditioner.limits_norms:
            self.w = limited(self.w, norm_limits(before, self.sums), self.sums)
        squares = self.sums.dot(self.g, self.g), self.sums.dot(self.step, self.step)
        self.new["cosine"] = cosine(self.sums.dot(self.g, self.step), *squares)
        # Nothing changes if anything is not finite.
        checked = [*self.g, self.alpha]
        self.applied = self.sums.all_finite(checked if self.loss is None else [*checked, self.loss])

    def assign(self, variables):
        """Assigns what the update made, or leaves every bit as it was."""
        applied = self.applied

        def assign(variable, value):
            value = ops.cast(value, variable.dtype)
            variable.assign(ops.where(applied, value, ops.convert_to_tensor(variable)))

        values = {"direction": self.d, "previous_gradient": self.g, **self.state}
        values["previous_preconditioned"] = self.preconditioned
        for variable, value in zip(variables["weights"], self.w):
            assign(variable, value)
        for name, slot in variables["slots"].items():
            for variable, value in zip(slot, values[name]):
                if variable is not None:
                    assign(variable, _in_range(value, variable.dtype))
        if self.optimizer.lars_coefficient:
            for position, ratio in zip(self.positions, self.ratios):
                self.ratio_rows[position] = ratio
            assign(variables["trust_ratios"], ops.stack(self.ratio_rows))
        if "curvature_sums" in variables:  # of the fused op; -1: not known
            sums = variables["curvature_sums"]
            assign(sums, ops.full(sums.shape, -1.0, sums.dtype))
        reals = ops.stack([self.new[name] for name in self.optimizer.real_names])
        assign(variables["reals"], reals)
        rejected = applied & ops.logical_not(self.first | self.accepted)
        changes = [applied, ops.logical_not(applied), rejected]
        changes = [ops.cast(change, self.old["updates"].dtype) for change in changes]
        counts = [self.old[name] + change for name, change in zip(COUNTS, changes)]
        variables["counts"].assign(ops.stack([*counts, changes[0]]))


def _unstack(variable):
    return list(ops.unstack(ops.convert_to_tensor(variable), variable.shape[0]))


def _in_range(value, dtype):
    """Slots of float16 variables must not become infinite: an infinite h would never come back."""
    most = 65504.0  # float16's largest number
    return ops.clip(value, -most, most) if dtype == "float16" else value


def _shortened(factor, xs):
    """A factor of 0 makes 0 of infinity too."""
    return [ops.where(factor > 0, factor * x, ops.zeros_like(x)) for x in xs]


def _trust_ratio(optimizer, w, step):
    norm = ops.sqrt(total(w * w))
    ratio = optimizer.lars_coefficient * norm / (ops.sqrt(total(step * step)) + optimizer.epsilon)
    return ops.where(norm > 0, ratio, ops.ones_like(ratio))


def cosine(slope, gradient_square, step_square):
    """Of the angle between the step and the negative gradient, from g'd, g'g and d'd."""
    norms = ops.sqrt(gradient_square) * ops.sqrt(step_square)
    known = (norms > 0) & ops.isfinite(slope / norms)  # sums may overflow
    return ops.where(known, -slope / norms, ops.zeros_like(norms))
