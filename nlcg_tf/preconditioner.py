"""Preconditioners: what NLCG makes of the gradient before it looks for a conjugate direction.

A preconditioner is a subclass of `Preconditioner`, a small object without state of its own. It says
which state it needs for a variable; the optimizer keeps that, and hands it over as lists, one entry
a variable. These methods raise no errors: what comes of a gradient that is not finite is dropped
by the optimizer.
"""

import dataclasses
import inspect
import math
from typing import Any, ClassVar

import keras
from keras import ops

from nlcg_tf.configurable import Configurable, is_fraction, is_number, resolve
from nlcg_tf.polar import matrix_shape, polar_factors
from nlcg_tf.reductions import TINY, Sums, norm

Tensors = list[Any]
State = dict[str, list[Any | None]]
COUPLINGS = ("elements", "variable", "model")

# The least y^T s beside its two terms g^T s and g_prev^T s, whose float32 sums are right to about
# 1e-6: so that two digits of the difference, and of what it makes of h, are.
RESOLUTION = 1e-4


class Preconditioner(Configurable):
    """Base class: P g = g / (1 + epsilon), what `preconditioner=None` stands for.

    Attributes:
        couples: what an element of P g depends on. `"elements"`: only on the same element of g, w
            and the state, and on `sums`; `"variable"`: on others of its variable too; `"model"`:
            on other variables.
        uses_steps: bool, whether `update` looks at y and s, which cost the previous gradient.
        uses_weights: bool, whether the weights w are looked at.
        limits_norms: bool, whether steps are kept from making kernels longer: see `norm_limits`.
            Not with `"elements"`.
    """

    couples: ClassVar[str] = "elements"
    uses_steps: ClassVar[bool] = False
    uses_weights: ClassVar[bool] = False
    limits_norms: bool = False

    def initial_state(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What is kept for a variable: from names to shape and initial value.

        Args:
            shape: of the variable.

        Returns:
            A dict from names to `(shape, value)`, the value a float or an array of that shape. With
            `couples = "elements"` each shape is the variable's.
        """
        return {}

    def update(
        self,
        state: State,
        g: Tensors,
        w: Tensors | None,
        y: Any,
        s: Any,
        gain_ratio: Any,
        sums: Sums,
    ) -> tuple[State, Any]:
        """The state after a gradient.

        Args:
            state: dict from names to lists, one entry a variable: a tensor, or `None` for a
                variable without it.
            g, w: lists of tensors, gradients and weights; w is `None` unless `uses_weights`.
            y, s: lists of tensors, the change of the gradient and the step that changed it, zero
                in the first update; `None` unless `uses_steps`.
            gain_ratio: scalar tensor in [0, 1], of `nlcg_tf.noise`; 0 where it is not measured.
            sums: a `nlcg_tf.reductions.Sums`, for sums over all elements of the model, of which
                this worker may hold a shard only.

        Returns:
            `(state, accepted)`: the new state, with the same names, numbers of entries and
            shapes, and whether y and s were good enough.
        """
        return state, True

    def apply(
        self, state: State, g: Tensors, w: Tensors | None, epsilon: float, sums: Sums
    ) -> tuple[Tensors, Any]:
        """P g, a list of tensors, and the mean of the diagonal that divides g or a scalar 1.

        NLCG's direction starts from z = -P g. `epsilon` is to be added to what gradients are
        divided by.
        """
        return [g_i / (1 + epsilon) for g_i in g], ops.ones((), g[0].dtype)


def get(identifier: Any) -> Any:
    """Resolves the `preconditioner` argument of `NLCG`.

    Args:
        identifier: `"bfgs"`, `"normalized_bfgs"`, `"spectral"`, `None`, or a `Preconditioner`.

    Raises:
        ValueError: for anything else.
    """
    found = resolve("preconditioner", identifier, NAMES, Preconditioner)
    if found is None:
        return None
    if found.couples not in COUPLINGS:
        raise ValueError(
            f"`couples` of a preconditioner must be one of {', '.join(map(repr, COUPLINGS))}. "
            f"Received: {found!r} with couples={found.couples!r}"
        )
    if found.limits_norms and found.couples == "elements":
        raise ValueError(
            "A preconditioner that limits norms couples at least a variable. Received: "
            f"{found!r} with limits_norms=True and couples='elements'"
        )
    for method in ("update", "apply"):
        _, *wanted = inspect.signature(getattr(Preconditioner, method)).parameters
        try:
            inspect.signature(getattr(found, method)).bind(*wanted)
        except TypeError:
            raise ValueError(
                f"`{method}` of a preconditioner must take ({', '.join(wanted)}). "
                f"Received: {found!r}"
            ) from None
    return found


def norm_limits(weights, sums):
    """The norm that each variable may have after a step: its own, or sqrt(columns) if that is more.

    Batch norm makes the outputs independent of the norms of the kernels before it. Without limits
    these would grow several times. A kernel smaller than its limit, such as one of zeros, may grow
    to about what initializers give.

    Args:
        weights: list of tensors, before the step.
        sums: a `nlcg_tf.reductions.Sums`.

    Returns:
        A list of scalar tensors, `None` for what is no kernel.
    """
    return [
        ops.maximum(norm(w_i), w_i.shape[-1] ** 0.5) if len(w_i.shape) > 1 else None
        for w_i in sums.pieces(weights)
    ]


def limited(weights, limits, sums):
    """The weights after a step, those kernels scaled back that are longer than their limits."""

    def scaled(w_i, limit):
        if limit is None:
            return w_i
        length = norm(w_i)
        return w_i * ops.where(length > limit, limit / length, ops.ones_like(length))

    return sums.join([scaled(*pair) for pair in zip(sums.pieces(weights), limits)])


def bfgs(h, g, y, s, sums):
    """Diagonal of the BFGS update of the Hessian estimate (paper, section 3.2.1).

    Args:
        h: list of tensors, the diagonal before the update.
        g: list of tensors of the same shapes, the gradient.
        y: list of tensors of the same shapes, gradient minus previous gradient.
        s: list of tensors of the same shapes, the step that was taken between the two.
        sums: a `nlcg_tf.reductions.Sums`.

    Returns:
        `(h_new, accepted)`: the new diagonal, and a scalar boolean that is False where the pair
        (y, s) was rejected and `h_new` is `h`.
    """
    hs = [h_i * s_i for h_i, s_i in zip(h, s)]
    ys = sums.dot(y, s)
    shs = sums.dot(s, hs)
    slope = sums.dot(g, s)
    resolved = ys > RESOLUTION * (ops.abs(slope) + ops.abs(slope - ys))
    # The paper has no guard; its authors' released code refuses non-positive curvature.
    accepted = resolved & (ys > TINY) & (shs > TINY) & ops.isfinite(ys) & ops.isfinite(shs)

    def update(h_i, hs_i, y_i):
        # Each square is divided as it is formed: y^2 alone overflows float32 beyond 1.8e19. An
        # element that overflows all the same keeps its value: an infinite h would never come back.
        candidate = h_i - hs_i * (hs_i / shs) + y_i * (y_i / ys)
        return ops.where(accepted & ops.isfinite(candidate), ops.abs(candidate), h_i)

    return [update(*entry) for entry in zip(h, hs, y)], accepted


def harmonic_mean(divisors, sums):
    """n / sum(1 / x) over all n elements of a list of tensors: a scalar, 1 where n is 0."""
    elements, inverses = sums.count(divisors), sums.sum([1 / x for x in divisors])
    return elements / inverses if elements else ops.ones_like(inverses)


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class DiagonalBFGS(Preconditioner):
    """The paper's preconditioner (section 3.2.1): P g = g / (h + epsilon), h by `bfgs`.

    For gradients without noise, that is with full batches: see docs/optimizer.md.
    """

    uses_steps = True

    def initial_state(self, shape):
        return {"hessian_diagonal": (shape, 1.0)}

    def update(self, state, g, w, y, s, gain_ratio, sums):
        h, accepted = bfgs(state["hessian_diagonal"], g, y, s, sums)
        return {"hessian_diagonal": h}, accepted

    def apply(self, state, g, w, epsilon, sums):
        divisors = [h_i + epsilon for h_i in state["hessian_diagonal"]]
        return [g_i / x_i for g_i, x_i in zip(g, divisors)], harmonic_mean(divisors, sums)


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class NormalizedBFGS(DiagonalBFGS):
    """The default: `DiagonalBFGS` with steps of the size of SGD's, which forgets old curvature.

        h = bfgs(h) + rate (1 - bfgs(h)),  rate = (1 - decay) (1 - gain_ratio)
        P g = H g / (h + epsilon),  H = the harmonic mean of h + epsilon

    Because of H only the relative sizes of the elements of h count. So noise that makes all of h
    larger does not change the steps. h moves back towards 1 in about `1 / (1 - decay)` updates, so
    that the curvature of old weights and of noise is forgotten. If the gradients have no noise
    (gain_ratio 1), nothing is forgotten.

    Args:
        decay: float in (0, 1]; with 1 nothing is ever forgotten.

    Raises:
        ValueError: for a decay outside this range.
    """

    decay: float = 0.99

    def __post_init__(self):
        self._check("decay", is_fraction, "lie in (0, 1]")

    def update(self, state, g, w, y, s, gain_ratio, sums):
        state, accepted = super().update(state, g, w, y, s, gain_ratio, sums)
        rate = (1 - self.decay) * (1 - gain_ratio)
        h = [h_i + rate * (1 - h_i) for h_i in state["hessian_diagonal"]]
        return {"hessian_diagonal": h}, accepted

    def apply(self, state, g, w, epsilon, sums):
        quotients, mean = super().apply(state, g, w, epsilon, sums)
        return [mean * q_i for q_i in quotients], mean


@keras.saving.register_keras_serializable(package="nlcg_tf")
@dataclasses.dataclass
class Spectral(Preconditioner):
    """The polar factor of each kernel's gradient, as long as the kernel.

    A variable W of two or more dimensions is a matrix, all dimensions but the last its rows; G is
    its gradient in that shape.

        O = G (G^T G)^(-1/2)             each singular value of G becomes 1, see `nlcg_tf.polar`
        P g = ||W|| O / ||O||            Frobenius norms
        P g = vector_length g / rms(g)   a variable of one dimension or none

    A step may not make a kernel longer than `norm_limits` says, unless `limits_norms` is False.

    If the root mean square of a kernel's elements is below 0.01 / sqrt(rows), the step is as long
    as if it had this value. Without this rule a kernel that is zero would never move. The value is
    about a hundredth of what initializers give.

    Args:
        vector_length: float > 0, root of the mean square of P g of a vector.
        limits_norms: bool. `True` is for networks with batch norm. Where no normalization follows a
            kernel, its norm matters, and the limit keeps the network from learning.

    Raises:
        ValueError: for a length that is not positive, or another value than a bool.
    """

    vector_length: float = 0.3
    limits_norms: bool = True

    couples = "variable"
    uses_weights = True

    def __post_init__(self):
        self._check("limits_norms", lambda x: type(x) is bool, "be True or False")
        self._check("vector_length", lambda x: is_number(x) and x > 0, "be a number above 0")

    def apply(self, state, g, w, epsilon, sums):
        shapes = [matrix_shape(g_i.shape) for g_i in g]
        kernels = [i for i, g_i in enumerate(g) if len(g_i.shape) > 1]
        factors = polar_factors([ops.reshape(g[i], shapes[i]) for i in kernels])
        factors = dict(zip(kernels, factors))

        def whitened(i, g_i):
            size = math.prod(shapes[i])
            if not size:
                return g_i
            if i in factors:
                length = ops.maximum(norm(w[i]), SMALLEST_KERNEL * shapes[i][1] ** 0.5)
                q_i = ops.reshape(factors[i], g_i.shape)
            else:
                # Squares must neither overflow nor vanish.
                length, q_i = self.vector_length * size**0.5, g_i / _or_one(ops.max(ops.abs(g_i)))
            return q_i * (length / _or_one(norm(q_i)))

        return [whitened(i, g_i) for i, g_i in enumerate(g)], ops.ones((), g[0].dtype)


def _or_one(x):
    return ops.where(x > 0, x, ops.ones_like(x))


# Root of the mean square of a kernel's elements, times the square root of its rows.
SMALLEST_KERNEL = 0.01


# To add one, add its class here.
NAMES = {"bfgs": DiagonalBFGS, "normalized_bfgs": NormalizedBFGS, "spectral": Spectral}
