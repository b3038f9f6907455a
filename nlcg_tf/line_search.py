"""The online stochastic line search: a scale of the learning rate that follows the loss.

A line search is a small object without state of its own. The optimizer keeps its state in scalar
variables, `learning_rate_scale` among them:

    initial_state()                -> {name: initial float}
    update(state, loss, updates)   -> the new state, a dict of scalar tensors with the same names

`updates` is the number of updates done before this one. `update` raises no errors: what it returns
for a loss that is not finite is dropped by the optimizer.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from nlcg_tf.configurable import Configurable, is_fraction, is_number


def _bounded(scale, minimum):
    return ops.clip(scale, minimum, 1.0)


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class OnlineLineSearch(Configurable):
    """The line search of the paper (section 3.2.2).

    With f the loss of this update and f_prev that of the update before,

        f > f_prev + decrease_threshold |f_prev|:  scale *= decrease_factor
        f < f_prev + increase_threshold |f_prev|:  scale *= increase_factor

    and the scale stays within [minimum_scale, 1]. The first loss is only remembered.

    Args:
        decrease_threshold: float, the relative rise of the loss above which the scale shrinks.
        increase_threshold: float, at most `decrease_threshold`: below it the scale grows again.
        decrease_factor: float in (0, 1].
        increase_factor: float, at least 1.
        minimum_scale: float in (0, 1].

    Raises:
        ValueError: for a setting outside its range.
    """

    decrease_threshold: float = 0.02
    increase_threshold: float = 0.01
    decrease_factor: float = 0.975
    increase_factor: float = 1.025
    minimum_scale: float = 1e-4

    def __post_init__(self):
        self._check("decrease_threshold", is_number, "be a number")
        self._check("increase_threshold", is_number, "be a number")
        self._check(
            "increase_threshold",
            lambda x: x <= self.decrease_threshold,
            f"not exceed decrease_threshold={self.decrease_threshold!r}",
        )
        self._check("decrease_factor", is_fraction, "lie in (0, 1]")
        self._check("increase_factor", lambda x: is_number(x) and x >= 1, "be at least 1")
        self._check("minimum_scale", is_fraction, "lie in (0, 1]")

    def initial_state(self) -> dict[str, float]:
        return {"learning_rate_scale": 1.0, "previous_loss": 0.0}

    def update(self, state: dict[str, Any], loss: Any, updates: Any) -> dict[str, Any]:
        previous, scale = state["previous_loss"], state["learning_rate_scale"]
        rose = loss > previous + self.decrease_threshold * ops.abs(previous)
        fell = loss < previous + self.increase_threshold * ops.abs(previous)
        shrunk = _bounded(scale * self.decrease_factor, self.minimum_scale)
        grown = _bounded(scale * self.increase_factor, self.minimum_scale)
        moved = ops.where(rose, shrunk, ops.where(fell, grown, scale))
        return {
            "learning_rate_scale": ops.where(updates == 0, scale, moved),
            "previous_loss": loss,
        }


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class StepLineSearch(Configurable):
    """The default strategy of the authors' released code: steps by the loss's moving average.

    Every `period` updates the moving average of the loss is compared with its value at the previous
    comparison. If the ratio exceeds some of the `limits`, the scale is multiplied by the factor of
    the highest of them. If it exceeds none, the scale is multiplied by `increase_factor`. The scale
    stays within [minimum_scale, 1]. The average starts with the first loss, which is also the first
    value to compare with. The released code also takes back a part of the last step; this class
    does not.

    Args:
        period: int, updates between two comparisons.
        smoothing: float in [0, 1), weight of the old average.
        limits: falling sequence of ratios.
        factors: sequence of factors in (0, 1], one for each limit.
        increase_factor: float, at least 1.
        minimum_scale: float in (0, 1].

    Raises:
        ValueError: for a setting outside its range.
    """

    period: int = 5
    smoothing: float = 0.7
    limits: tuple = (1.15, 1.125, 1.1, 1.075, 1.05, 1.025, 1.01)
    factors: tuple = (0.5, 0.7, 0.8, 0.9, 0.95, 0.975, 1.0)
    increase_factor: float = 1.05
    minimum_scale: float = 1e-4

    def __post_init__(self):
        for name in ("limits", "factors"):
            self._check(name, lambda xs: isinstance(xs, Iterable), "be a sequence")
        self.limits, self.factors = tuple(self.limits), tuple(self.factors)
        self._check("period", lambda x: type(x) is int and x >= 1, "be an int >= 1")
        self._check("smoothing", lambda x: is_number(x) and 0 <= x < 1, "lie in [0, 1)")
        self._check(
            "limits",
            lambda xs: all(map(is_number, xs)) and list(xs) == sorted(xs, reverse=True),
            "be numbers that fall",
        )
        self._check(
            "factors",
            lambda xs: len(xs) == len(self.limits),
            f"have one entry for each of limits={self.limits!r}",
        )
        self._check("factors", lambda xs: all(map(is_fraction, xs)), "lie in (0, 1]")
        self._check("increase_factor", lambda x: is_number(x) and x >= 1, "be at least 1")
        self._check("minimum_scale", is_fraction, "lie in (0, 1]")

    def initial_state(self) -> dict[str, float]:
        return {"learning_rate_scale": 1.0, "average_loss": 0.0, "compared_loss": 0.0}

    def update(self, state: dict[str, Any], loss: Any, updates: Any) -> dict[str, Any]:
        first = updates == 0
        average = self.smoothing * state["average_loss"] + (1 - self.smoothing) * loss
        average = ops.where(first, loss, average)
        compared = ops.where(first, loss, state["compared_loss"])
        ratio = ops.where(compared == 0, ops.ones_like(average), average / compared)
        # The limits fall: those that the ratio exceeds are the last ones.
        exceeded = ops.sum(
            ops.cast(ratio > ops.convert_to_tensor(self.limits, ratio.dtype), "int32")
        )
        factors = ops.convert_to_tensor([*self.factors, self.increase_factor], ratio.dtype)
        factor = ops.take(factors, len(self.limits) - exceeded)
        due = (updates % self.period == 0) & ops.logical_not(first)
        scale = state["learning_rate_scale"]
        return {
            "learning_rate_scale": ops.where(
                due, _bounded(scale * factor, self.minimum_scale), scale
            ),
            "average_loss": average,
            "compared_loss": ops.where(due, average, compared),
        }


NAMES = {"online": OnlineLineSearch, "step": StepLineSearch}
