"""NLCG's default with one mechanism of it changed: what each is worth.

    python -m scripts.curvature --rates=3 --seeds=10 --updates-factor=0.5 --optimizers default ...

A variant is named on the study's command line as the optimizers are, and gets the same search. All
of them, `default` too, take the reference update, so that nothing but the mechanism differs.
"""

import collections
import contextlib
import dataclasses
from unittest import mock

from trainers.flags import defaults
from trainers.optimizers import choice


@dataclasses.dataclass(frozen=True)
class Variant(choice.Choice):
    """As `Choice`.

    Attributes:
        arguments: of `NLCG`, in place of the default's.
        changes: dict from functions of the update, "module.name", to what stands for them.
    """

    arguments: dict = dataclasses.field(default_factory=dict)
    changes: dict = dataclasses.field(default_factory=dict)


MARKERS = {"-": "o", "--": "s", ":": "^"}  # variants of one colour differ in both


def _variant(title, colour, line="-", arguments=None, **changes):
    changes = {name.replace("__", "."): change for name, change in changes.items()}
    return Variant(title, colour, line, MARKERS[line], {}, None, False, arguments or {}, changes)


def _constant_beta(delta_new, delta, gain_ratio, momentum):
    return momentum


def _fletcher_reeves(delta_new, delta, gain_ratio, momentum):
    from nlcg_tf import direction

    return direction.fletcher_reeves(delta_new, delta)


def _full_look_ahead(self, preconditioned, d, beta, gain_ratio, cap=1.0):
    return [beta * d_i - cap * z_i for z_i, d_i in zip(preconditioned, d)]


def _no_norm_factor(squared_norm, mean, first, gain_ratio):
    return 1.0, mean, first


def _no_clip(length, mean, momentum):
    return 1.0, mean


def _divided(self, state, g, w, epsilon, sums):
    """P g of `DiagonalBFGS`: the scale of h remains."""
    from nlcg_tf import preconditioner

    return preconditioner.DiagonalBFGS.apply(self, state, g, w, epsilon, sums)


def _gain_ratio(value):
    def measure_gain_ratio(
        loss, previous_loss, slope, previous_slope, prediction_error, predicted_change, updates
    ):
        from keras import ops

        return ops.full_like(slope, value), prediction_error, predicted_change

    return measure_gain_ratio


_NO_LIMIT = {"class_name": "nlcg_tf>Spectral", "config": {"limits_norms": False}}
ABLATION = {
    "default": _variant("NLCG", choice.VERMILION),
    "beta_constant": _variant("beta 0.9", choice.BLACK, direction__blended=_constant_beta),
    "beta_fr": _variant("beta: Fletcher-Reeves", choice.SKY, direction__blended=_fletcher_reeves),
    "no_forgetting": _variant("nothing forgotten", choice.BLUE, arguments={"decay": 1.0}),
    "full_look_ahead": _variant(
        "full look-ahead", choice.GREEN, "--", reference__Stages___look_ahead=_full_look_ahead
    ),
    "no_look_ahead": _variant("no look-ahead", choice.GREEN, arguments={"nesterov": False}),
    "no_norm_factor": _variant("no norm factor", choice.ORANGE, noise__norm_factor=_no_norm_factor),
    "no_clip": _variant("no update clipping", choice.ORANGE, "--", noise__update_clip=_no_clip),
    "not_normalized": _variant(
        "not normalized", choice.PURPLE, preconditioner__NormalizedBFGS__apply=_divided
    ),
    "gain_ratio_0": _variant(
        "gain ratio 0", choice.GREY, noise__measure_gain_ratio=_gain_ratio(0.0)
    ),
    "gain_ratio_1": _variant(
        "gain ratio 1", choice.GREY, "--", noise__measure_gain_ratio=_gain_ratio(1.0)
    ),
    "spectral_no_limit": _variant(
        "NLCG-spectral, no limit", choice.SKY, "--", arguments={"preconditioner": _NO_LIMIT}
    ),
}
# All that the study knows, in the order of its tables.
KNOWN = collections.ChainMap(ABLATION, choice.OPTIMIZERS)


def make_optimizer(name):
    """The trainers' optimizer, or a variant of the default, by its name; the rate is set later."""
    if name not in ABLATION:
        flags = {**defaults(), "optimizer": name, **KNOWN[name].flags, "weight_decay": 0.0}
        return choice.from_flags(flags, 0.01, paper_line_search="online")
    import nlcg_tf  # not before a worker trains: it imports Keras

    arguments = dict(ABLATION[name].arguments)
    decay = arguments.pop("decay", 0.99)
    arguments.setdefault("preconditioner", nlcg_tf.preconditioner.NormalizedBFGS(decay))
    return nlcg_tf.NLCG(0.01, fused=False, **arguments)


@contextlib.contextmanager
def changed(name):
    """Context in which a variant's update is traced."""
    with contextlib.ExitStack() as stack:
        for place, change in getattr(KNOWN[name], "changes", {}).items():
            stack.enter_context(mock.patch(f"nlcg_tf.{place}", change))
        yield
