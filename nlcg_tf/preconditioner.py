"""Preconditioners: what NLCG makes of the gradient before it looks for a conjugate direction.

A preconditioner is a small object without state of its own. The optimizer keeps its state in slots,
one tensor of the shape of each variable for each name, and hands them over as lists, one entry a
variable. Sums run over the elements of all variables: the paper's w is the whole weight vector.

    uses_steps = True                            whether `update` looks at y and s
    initial_state()                           -> {name of a slot: initial float}
    update(state, g, y, s, kappa)             -> (the new state, whether y and s were good enough)
    apply(state, g, epsilon)                  -> (P g, the mean of the diagonal that divides g)

`state` is a dict of lists; g the gradient, y its change and s the step that changed it, zero in the
first update and both `None` where they are not used; kappa in [0, 1] how free of noise g is, 0
where that is not measured. NLCG's direction then starts from z = -P g.
All is total: nothing is raised, and what comes of a gradient that is not finite is dropped by the
optimizer.
"""

import dataclasses
from typing import Any

import keras
from keras import ops

from nlcg_tf.configurable import Configurable, is_fraction, is_number, resolve
from nlcg_tf.reductions import TINY, count, dot, sum_all

Tensors = list[Any]
State = dict[str, Tensors]

# The least y^T s beside its two terms g^T s and g_prev^T s, whose float32 sums are right to about
# 1e-6: so that two digits of the difference, and of what it makes of h, are.
RESOLUTION = 1e-4


def get(identifier: Any) -> Any:
    """Resolves the `preconditioner` argument of `NLCG`.

    Args:
        identifier: `"bfgs"`, `"normalized_bfgs"`, `"rms"`, `None`, or an object with the methods
            above.

    Raises:
        ValueError: for anything else.
    """
    return resolve("preconditioner", identifier, NAMES, ("initial_state", "update", "apply"))


def uses_steps(preconditioner: Any) -> bool:
    """Whether a preconditioner, or `None`, needs y and s."""
    return preconditioner is not None and getattr(preconditioner, "uses_steps", True)


def bfgs(h, g, y, s):
    """Diagonal of the BFGS update of the Hessian estimate (paper, section 3.2.1).

    Args:
        h: list of tensors, the diagonal before the update.
        g: list of tensors of the same shapes, the gradient.
        y: list of tensors of the same shapes, gradient minus previous gradient.
        s: list of tensors of the same shapes, the step that was taken between the two.

    Returns:
        `(h_new, accepted)`: the new diagonal, and a scalar boolean that is False where the pair
        (y, s) was rejected and `h_new` is `h`.
    """
    hs = [h_i * s_i for h_i, s_i in zip(h, s)]
    ys = dot(y, s)
    shs = dot(s, hs)
    slope = dot(g, s)
    resolved = ys > RESOLUTION * (ops.abs(slope) + ops.abs(slope - ys))
    # The paper has no guard; its authors' released code refuses non-positive curvature.
    accepted = resolved & (ys > TINY) & (shs > TINY) & ops.isfinite(ys) & ops.isfinite(shs)

    def update(h_i, hs_i, y_i):
        # Each square is divided as it is formed: y^2 alone overflows float32 beyond 1.8e19. An
        # element that overflows all the same keeps its value: an infinite h would never come back.
        candidate = h_i - hs_i * (hs_i / shs) + y_i * (y_i / ys)
        return ops.where(accepted & ops.isfinite(candidate), ops.abs(candidate), h_i)

    return [update(*entry) for entry in zip(h, hs, y)], accepted


def harmonic_mean(divisors):
    """n / sum(1 / x) over all n elements of a list of tensors: a scalar, 1 where n is 0."""
    elements, inverses = count(divisors), sum_all([1 / x for x in divisors])
    return elements / inverses if elements else ops.ones_like(inverses)


class Identity:
    """h = 1: what `preconditioner=None` stands for."""

    def initial_state(self) -> dict[str, float]:
        return {}

    def update(
        self, state: State, g: Tensors, y: Tensors, s: Tensors, kappa: Any
    ) -> tuple[State, Any]:
        return state, True

    def apply(self, state: State, g: Tensors, epsilon: float) -> tuple[Tensors, Any]:
        return [g_i / (1 + epsilon) for g_i in g], ops.ones((), g[0].dtype)


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class DiagonalBFGS(Configurable):
    """The paper's preconditioner (section 3.2.1): P g = g / (h + epsilon), h by `bfgs`.

    For gradients without noise. y holds the noise of two mini-batches, which does not shrink with
    the step s, so that y^2 / y^T s grows as steps shrink, and they shrink because h grows:
    `diagnostics()["preconditioner_mean"]`, the harmonic mean of h, then rises without end.
    """

    def initial_state(self) -> dict[str, float]:
        return {"hessian_diagonal": 1.0}

    def update(
        self, state: State, g: Tensors, y: Tensors, s: Tensors, kappa: Any
    ) -> tuple[State, Any]:
        h, accepted = bfgs(state["hessian_diagonal"], g, y, s)
        return {"hessian_diagonal": h}, accepted

    def apply(self, state: State, g: Tensors, epsilon: float) -> tuple[Tensors, Any]:
        divisors = [h_i + epsilon for h_i in state["hessian_diagonal"]]
        return [g_i / x_i for g_i, x_i in zip(g, divisors)], harmonic_mean(divisors)


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class NormalizedBFGS(DiagonalBFGS):
    """`DiagonalBFGS` that keeps the mean step as it is, and forgets.

        h = bfgs(h) + rate (1 - bfgs(h)),  rate = (1 - decay) (1 - kappa)
        P g = H g / (h + epsilon),  H = the harmonic mean of h + epsilon

    Only the relative curvature counts: the mean over all elements of step per gradient is the
    learning rate, as in SGD, whatever the noise in the gradients does to the size of h. What was
    learned at other weights or of noise fades towards 1, in `1 / (1 - decay)` updates; of gradients
    without noise (kappa 1) nothing is forgotten.

    Args:
        decay: float in (0, 1]; with 1 nothing is ever forgotten.

    Raises:
        ValueError: for a decay outside this range.
    """

    decay: float = 0.99

    def __post_init__(self):
        self._check("decay", is_fraction, "lie in (0, 1]")

    def update(
        self, state: State, g: Tensors, y: Tensors, s: Tensors, kappa: Any
    ) -> tuple[State, Any]:
        state, accepted = super().update(state, g, y, s, kappa)
        rate = (1 - self.decay) * (1 - kappa)
        h = [h_i + rate * (1 - h_i) for h_i in state["hessian_diagonal"]]
        return {"hessian_diagonal": h}, accepted

    def apply(self, state: State, g: Tensors, epsilon: float) -> tuple[Tensors, Any]:
        quotients, mean = super().apply(state, g, epsilon)
        return [mean * q_i for q_i in quotients], mean


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class RMS(Configurable):
    """Division by the root of a running mean of squared gradients, at the gradient's own length.

        v = decay * v + (1 - decay) g^2
        q = g / (sqrt(v) + epsilon)
        P g = c q,  c = ||g|| / ||q||

    The direction of RMSProp (Tieleman & Hinton 2012) grafted to the length of the gradient (Agarwal
    et al. 2020, arXiv 2002.11803), so that learning rates are those of SGD. Adam's correction of v
    for its start at 0, one factor for all elements, would cancel in c. It looks at no step and
    needs no previous gradient.

    Args:
        decay: float in (0, 1).

    Raises:
        ValueError: for a decay outside this range.
    """

    decay: float = 0.99

    uses_steps = False

    def __post_init__(self):
        self._check("decay", lambda x: is_number(x) and 0 < x < 1, "lie in (0, 1)")

    def initial_state(self) -> dict[str, float]:
        return {"second_moment": 0.0}

    def update(
        self, state: State, g: Tensors, y: Tensors, s: Tensors, kappa: Any
    ) -> tuple[State, Any]:
        def update(v_i, g_i):
            # An element whose square overflows keeps its value: infinity would never come back.
            candidate = v_i + (1 - self.decay) * (g_i * g_i - v_i)
            return ops.where(ops.isfinite(candidate), candidate, v_i)

        return {"second_moment": [update(*e) for e in zip(state["second_moment"], g)]}, True

    def apply(self, state: State, g: Tensors, epsilon: float) -> tuple[Tensors, Any]:
        q = [g_i / (ops.sqrt(v_i) + epsilon) for g_i, v_i in zip(g, state["second_moment"])]
        scale = ops.sqrt(dot(g, g) / dot(q, q))
        # Where the squares vanish or overflow there is no direction to trust.
        scale = ops.where(ops.isfinite(scale), scale, ops.zeros_like(scale))
        return [scale * q_i for q_i in q], scale


# To add one, add its class here.
NAMES = {"bfgs": DiagonalBFGS, "normalized_bfgs": NormalizedBFGS, "rms": RMS}
