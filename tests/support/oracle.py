"""NLCG in float64 NumPy on one flat weight vector: the yardstick of the tests.

Written from the equations alone (Adya, Palakkode & Tuzel 2018, section 2 and 3), sharing nothing
with the package.
"""

import numpy as np

STEP_FACTORS = [
    (1.15, 0.5),
    (1.125, 0.7),
    (1.1, 0.8),
    (1.075, 0.9),
    (1.05, 0.95),
    (1.025, 0.975),
    (1.01, 1.0),
]


class Oracle:
    """One update a call of `update`; `sizes` tells LARS where each variable lies in the vector.

    `preconditioner`: a name, `None`, or a function of g and w to P g. `limit`: a function of the
    weights before and after a step, to the weights that are kept.
    """

    def __init__(
        self,
        w,
        sizes,
        rule,
        preconditioner,
        line_search,
        epsilon=1e-8,
        lars=None,
        nesterov=False,
        momentum=0.9,
        decay=0.99,
        limit=lambda before, after: after,
    ):
        self.w = np.array(w, np.float64)
        self.sizes, self.rule, self.eps, self.lars = sizes, rule, epsilon, lars
        self.preconditioner, self.line_search = preconditioner, line_search
        self.nesterov, self.momentum, self.decay = nesterov, momentum, decay
        self.limit = limit
        self.h = np.ones_like(self.w)  # BFGS
        self.d = np.zeros_like(self.w)
        self.g_prev, self.z = np.zeros_like(self.w), np.zeros_like(self.w)
        self.s = np.zeros_like(self.w)  # the last step, without weight decay
        self.alpha = np.zeros_like(self.w)
        self.delta = self.beta = self.curvature = self.cosine = self.gain_ratio = 0.0
        self.prediction_error = self.predicted_change = self.mean_squared_norm = (
            self.first_squared_norm
        ) = 0.0
        self.mean_update_norm = 0.0
        self.last_loss = 0.0
        self.preconditioner_mean = 1.0
        self.scale = 1.0
        self.previous_loss = self.ema = self.ema_compared = None
        self.updates = self.skipped = self.rejected = self.clipped = 0

    def update(self, g, loss, learning_rate, weight_decay=0.0):
        g = np.asarray(g, np.float64)
        uses_loss = self.line_search or self.rule == "blended"
        if not np.isfinite(g).all() or (uses_loss and not np.isfinite(loss)):
            self.skipped += 1
            return
        if self.rule == "blended":
            self._test(g, loss)
        if self.preconditioner in ("bfgs", "normalized_bfgs"):
            self._learn_h(g)
        z_prev, self.z = self.z, self._precondition(g)
        delta_new = -float(g @ self.z)
        self.beta = self._beta(g, delta_new, z_prev) if self.updates > 0 else 0.0
        if self.rule == "momentum":
            self.beta = self.momentum
        self.d = self.z + self.beta * self.d
        ahead = self.nesterov * (1 - self.gain_ratio)
        direction = self.d + ahead * (self.z + self.beta * self.d - self.d)
        self.delta, self.g_prev = delta_new, g
        self.cosine = float(-g @ direction / (np.linalg.norm(g) * np.linalg.norm(direction)))
        self.clip_factor = 1.0
        if self.line_search:
            getattr(self, "_" + self.line_search)(loss)
        decayed = self.w * (1 - weight_decay * learning_rate)
        self.step_size = learning_rate * self.scale
        if self.rule == "blended" and self.mean_squared_norm:
            self.step_size *= (self.first_squared_norm / self.mean_squared_norm) ** (
                (1 - self.gain_ratio) / 2
            )
            self._clip(np.linalg.norm(direction), learning_rate * self.scale)
            self.d, direction = self.clip_factor * self.d, self.clip_factor * direction
        self.alpha = self.step_size * self._trust_ratios(direction)
        self.s = self.alpha * direction
        self.w = self.limit(self.w, decayed + self.s)
        self.updates += 1

    def _test(self, g, loss):
        """gain_ratio from the last step's change of the loss, and the gradients' mean length."""
        if self.updates > 0:
            predicted_change = (abs(g @ self.s) + abs(self.g_prev @ self.s)) / 2
            error = abs(loss - self.last_loss - (g + self.g_prev) @ self.s / 2)
            error = max(error - 1e-6 * abs(loss), 0.0)
            old = 0.9 if self.updates > 1 else 0.0
            self.prediction_error = old * self.prediction_error + (1 - old) * error
            self.predicted_change = old * self.predicted_change + (1 - old) * predicted_change
            left = self.prediction_error / self.predicted_change if self.predicted_change else 1.0
            self.gain_ratio = min(max(1 - left, 0.0), 1.0)
            bounded = min(g @ g, 100 * self.mean_squared_norm)
            self.mean_squared_norm = 0.99 * self.mean_squared_norm + 0.01 * bounded
        else:
            self.mean_squared_norm = self.first_squared_norm = float(g @ g)
        self.last_loss = loss

    def _clip(self, norm, learning_rate):
        """No step of more than twice the mean length; lengths are those at a learning rate of 1."""
        length = norm * self.step_size / learning_rate
        if self.mean_update_norm == 0:
            self.mean_update_norm = length / (1 - self.momentum)
            return
        if length > 2 * self.mean_update_norm:
            self.clip_factor = 2 * self.mean_update_norm / length
            self.clipped += 1
        self.mean_update_norm = 0.9 * self.mean_update_norm + 0.1 * self.clip_factor * length

    def _learn_h(self, g):
        if self.updates > 0:
            y, s = g - self.g_prev, self.s
            ys = self.curvature = float(np.sum(y * s))
            shs = float(np.sum(s * self.h * s))
            terms = abs(float(g @ s)) + abs(float(self.g_prev @ s))
            if ys > 1e-30 and ys > 1e-4 * terms and shs > 1e-30:
                self.h = np.abs(self.h - (self.h * s) ** 2 / shs + y**2 / ys)
            else:
                self.rejected += 1
        if self.preconditioner == "normalized_bfgs":
            rate = (1 - self.decay) * (1 - self.gain_ratio)
            self.h = (1 - rate) * self.h + rate

    def _precondition(self, g):
        """z, minus the preconditioned gradient."""
        if callable(self.preconditioner):
            return -self.preconditioner(g, self.w)
        if self.preconditioner is None:
            return -g / (1 + self.eps)
        divisor = self.h + self.eps
        self.preconditioner_mean = len(g) / np.sum(1 / divisor) if len(g) else 1.0
        normalized = self.preconditioner == "normalized_bfgs"
        return -(self.preconditioner_mean if normalized else 1.0) * g / divisor

    def _beta(self, g, delta_new, z_prev):
        top = delta_new
        if self.rule == "polak_ribiere":
            top += float(g @ z_prev)
        beta = min(max(top / (self.delta + 1e-30), 0.0), 1.0)
        if self.rule == "blended":
            beta = self.gain_ratio * beta + (1 - self.gain_ratio) * self.momentum
        return beta

    def _trust_ratios(self, direction):
        ratios = np.ones_like(self.w)
        start = 0
        for size in self.sizes if self.lars else []:
            part = slice(start, start + size)
            norm = np.linalg.norm(self.w[part])
            if norm > 0:
                ratios[part] = self.lars * norm / (np.linalg.norm(direction[part]) + self.eps)
            start += size
        return ratios

    def _online(self, loss):
        if self.previous_loss is not None:
            if loss > self.previous_loss + 0.02 * abs(self.previous_loss):
                self.scale = max(self.scale * 0.975, 1e-4)
            elif loss < self.previous_loss + 0.01 * abs(self.previous_loss):
                self.scale = min(self.scale * 1.025, 1.0)
        self.previous_loss = loss

    def _step(self, loss):
        if self.ema is None:
            self.ema = self.ema_compared = loss
            return
        self.ema = 0.7 * self.ema + 0.3 * loss
        if self.updates % 5 == 0:
            ratio = self.ema / self.ema_compared
            self.ema_compared = self.ema
            factor = next((f for limit, f in STEP_FACTORS if ratio > limit), 1.05)
            self.scale = max(min(self.scale * factor, 1.0), 1e-4)
