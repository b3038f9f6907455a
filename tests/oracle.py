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
    """One update a call of `update`; `sizes` tells LARS where each variable lies in the vector."""

    def __init__(self, w, sizes, rule, preconditioner, line_search, epsilon=1e-8, lars=None):
        self.w = np.array(w, np.float64)
        self.sizes, self.rule, self.eps, self.lars = sizes, rule, epsilon, lars
        self.preconditioner, self.line_search = preconditioner, line_search
        self.h = np.ones_like(self.w)
        self.d = np.zeros_like(self.w)
        self.g_prev = np.zeros_like(self.w)
        self.alpha = np.zeros_like(self.w)
        self.delta = self.beta = self.curvature = self.cosine = 0.0
        self.scale = 1.0
        self.previous_loss = self.ema = self.ema_compared = None
        self.updates = self.skipped = self.rejected = 0

    def update(self, g, loss, learning_rate, weight_decay=0.0):
        g = np.asarray(g, np.float64)
        if not np.isfinite(g).all() or (self.line_search and not np.isfinite(loss)):
            self.skipped += 1
            return
        h_before = self.h.copy()
        if self.preconditioner and self.updates > 0:
            y = g - self.g_prev
            s = self.alpha * self.d
            ys = self.curvature = float(np.sum(y * s))
            shs = float(np.sum(s * self.h * s))
            if ys > self.eps and shs > self.eps:
                down = (self.h * s) ** 2 / (shs + self.eps)
                self.h = np.abs(self.h - down + y**2 / (ys + self.eps))
            else:
                self.rejected += 1
        z = -g / (self.h + self.eps)
        delta_new = -float(np.sum(g * z))
        beta = 0.0
        if self.updates > 0:
            top = delta_new
            if self.rule == "polak_ribiere":
                top -= float(np.sum(g * self.g_prev / (h_before + self.eps)))
            beta = min(max(top / (self.delta + self.eps), 0.0), 1.0)
        self.d = z + beta * self.d
        self.delta, self.beta, self.g_prev = delta_new, beta, g
        self.cosine = float(-g @ self.d / (np.linalg.norm(g) * np.linalg.norm(self.d)))
        if self.line_search:
            getattr(self, "_" + self.line_search)(loss)
        decayed = self.w * (1 - weight_decay * learning_rate)
        self.step_size = learning_rate * self.scale
        self.alpha = self.step_size * self._trust_ratios()
        self.w = decayed + self.alpha * self.d
        self.updates += 1

    def _trust_ratios(self):
        ratios = np.ones_like(self.w)
        start = 0
        for size in self.sizes if self.lars else []:
            part = slice(start, start + size)
            norm = np.linalg.norm(self.w[part])
            if norm > 0:
                ratios[part] = self.lars * norm / (np.linalg.norm(self.d[part]) + self.eps)
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
