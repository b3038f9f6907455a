"""NLCG's default with one part of it changed: what each part is worth.

    python -m scripts.curvature --folder=runs/ablation --optimizers nlcg decay_1 no_look_ahead ...

A variant is named on the study's command line as the optimizers are, and gets the same search.
"""

import collections
import dataclasses

from trainers.flags import defaults
from trainers.optimizers import choice


@dataclasses.dataclass(frozen=True)
class Variant(choice.Choice):
    """As `Choice`.

    Attributes:
        decay: of `normalized_bfgs`; `None` for its default.
        blind: whether the optimizer is told a loss of 0, of which nothing can be foretold: kappa is
            0, and beta the constant `momentum`.
    """

    decay: float | None = None
    blind: bool = False


MARKERS = {"-": "o", "--": "s", ":": "^"}  # variants of one colour differ in both


def _variant(title, colour, line="-", decay=None, blind=False, **flags):
    flags = {**choice.flags_of("nlcg"), "line_search": "none", **flags}
    return Variant(title, colour, line, MARKERS[line], flags, decay=decay, blind=blind)


ABLATION = {
    "decay_1": _variant("nothing forgotten", choice.BLUE, decay=1.0),
    "decay_0999": _variant("decay 0.999", choice.BLUE, "--", decay=0.999),
    "decay_095": _variant("decay 0.95", choice.BLUE, ":", decay=0.95),
    "no_look_ahead": _variant("no look-ahead", choice.GREEN, nesterov=False),
    "constant": _variant("beta 0.9", choice.BLACK, blind=True),
    "not_normalized": _variant("not normalized", choice.PURPLE, preconditioner="bfgs"),
    "fr_normalized": _variant(
        "Fletcher-Reeves", choice.SKY, update_rule="fletcher_reeves", nesterov=False
    ),
    "pr_normalized": _variant(
        "Polak-Ribiere", choice.SKY, "--", update_rule="polak_ribiere", nesterov=False
    ),
}
# All that the study knows, in the order of its tables.
KNOWN = collections.ChainMap(ABLATION, choice.OPTIMIZERS)


def make_optimizer(name):
    """The trainers' optimizer, or a variant of one, by its name; the rate is set later."""
    flags = {**defaults(), "optimizer": name, **KNOWN[name].flags, "weight_decay": 0.0}
    decay = getattr(KNOWN[name], "decay", None)
    if decay is not None:
        from nlcg_tf import preconditioner  # not before a worker trains: it imports Keras

        flags["preconditioner"] = preconditioner.NAMES[flags["preconditioner"]](decay)
    return choice.from_flags(flags, 0.01, paper_line_search="online")
