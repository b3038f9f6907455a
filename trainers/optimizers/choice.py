"""The optimizers to choose from: one table, for command lines, training, tables and figures.

To add one, add a line to `OPTIMIZERS`. Nothing here imports Keras before an optimizer is made.
"""

import dataclasses
from collections.abc import Callable

# Okabe and Ito's colours, which colour-blind readers can tell apart; grey stands for yellow,
# which is too light for lines.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#8C8C8C"


@dataclasses.dataclass(frozen=True)
class Choice:
    """An optimizer, or a variant of one.

    Attributes:
        title: its name in tables and figures.
        colour, line, marker: how figures draw it, as in Matplotlib.
        flags: the trainers' flags that choose it.
        make: function of `(schedule, weight_decay, lars_coefficient, **nlcg_arguments)` to a Keras
            optimizer; `None` for a variant, which its flags make of another, and for what the
            trainers do not have.
        decays: whether its weights decay apart from the loss.
    """

    title: str
    colour: str
    line: str
    marker: str
    flags: dict = dataclasses.field(default_factory=dict)
    make: Callable | None = None
    decays: bool = False


def _nlcg(schedule, weight_decay, lars_coefficient, **nlcg_arguments):
    import nlcg_tf

    return nlcg_tf.NLCG(schedule, lars_coefficient=lars_coefficient, **nlcg_arguments)


def _keras(name, **arguments):
    def make(schedule, *unused, **unused_too):
        import keras

        return getattr(keras.optimizers, name)(schedule, **arguments)

    return make


def _tf1(nesterov):
    """Momentum as TensorFlow 1 has it, most likely the paper's."""

    def make(schedule, *unused, **unused_too):
        from trainers.optimizers.momentum import Momentum

        return Momentum(schedule, nesterov=nesterov)

    return make


def _lars(schedule, weight_decay, lars_coefficient, **unused):
    from trainers.optimizers.lars import LARS

    # It must see the decay of the weights apart from the gradient.
    return LARS(schedule, trust_coefficient=lars_coefficient or 0.001, l2=2 * weight_decay)


def _muon(length):
    def make(schedule, *unused, **unused_too):
        from trainers.optimizers.muon import Muon

        return Muon(schedule, length=length)

    return make


def _blended(preconditioner):
    flags = {"optimizer": "nlcg", "update_rule": "blended", "nesterov": True}
    return {**flags, "preconditioner": preconditioner}


def _published(rule, preconditioner="bfgs"):
    flags = {"optimizer": "nlcg", "update_rule": rule, "nesterov": False}
    return {**flags, "preconditioner": preconditioner}


_SPECTRAL = {"optimizer": "nlcg", "preconditioner": "spectral", "nesterov": True}
_FR, _PR = "fletcher_reeves", "polak_ribiere"
_RMSPROP = {"rho": 0.9, "momentum": 0.9, "epsilon": 1.0}
# Their order is that of tables and legends.
OPTIMIZERS = {
    "nlcg": Choice("NLCG", VERMILION, "-", "o", _blended("normalized_bfgs"), _nlcg),
    "nlcg_noprec": Choice("NLCG, no preconditioner", ORANGE, "--", "^", _blended("none")),
    "nlcg_fr": Choice("NLCG-FR", BLUE, "-", "D", _published(_FR)),
    "nlcg_pr": Choice("NLCG-PR", BLUE, "--", "d", _published(_PR)),
    "nlcg_fr_noprec": Choice("NLCG-FR, h = 1", SKY, "-", "v", _published(_FR, "none")),
    "nlcg_pr_noprec": Choice("NLCG-PR, h = 1", SKY, "--", "<", _published(_PR, "none")),
    "nlcg_spectral": Choice(
        "NLCG-spectral", VERMILION, "-", "s", {**_SPECTRAL, "update_rule": "momentum"}
    ),
    "muon": Choice("Muon", PURPLE, "-", "p", make=_muon("shape")),
    "muon_norm": Choice("Muon, kernel's norm", PURPLE, "--", "h", make=_muon("norm")),
    "momentum": Choice("Momentum", BLACK, "-", "D", make=_keras("SGD", momentum=0.9)),
    "nesterov": Choice(
        "Nesterov", GREY, "-.", "P", make=_keras("SGD", momentum=0.9, nesterov=True)
    ),
    "momentum_tf1": Choice("Momentum, TF1", BLACK, "--", "v", make=_tf1(nesterov=False)),
    "nesterov_tf1": Choice("Nesterov, TF1", GREY, "-", "X", make=_tf1(nesterov=True)),
    "lars": Choice("LARS", PURPLE, "-", "*", make=_lars, decays=True),
    "rmsprop": Choice("RMSProp", SKY, ":", "h", make=_keras("RMSprop", **_RMSPROP)),
    "sgd": Choice("SGD", GREY, ":", "<", make=_keras("SGD")),
    "adam": Choice("Adam", GREEN, "-", "X", make=_keras("Adam")),
    # Keras' default decay for AdamW: 0.004 of each weight times the rate.
    "adamw": Choice(
        "AdamW", GREEN, "--", "p", make=_keras("AdamW", weight_decay=0.004), decays=True
    ),
    "lamb": Choice("Lamb", GREEN, ":", ">", make=_keras("Lamb", weight_decay=0.004), decays=True),
    "lbfgs": Choice("L-BFGS", PURPLE, "--", "*"),  # of scripts/curvature alone
}


def trained():
    """The names that `--optimizer` takes."""
    return [name for name, choice in OPTIMIZERS.items() if choice.make]


def flags_of(name):
    """The trainers' flags that choose an optimizer or a variant of one."""
    return {"optimizer": name, **OPTIMIZERS[name].flags}


def from_flags(flags, schedule, paper_line_search):
    """The optimizer that the trainers' flags ask for.

    Args:
        flags: dict of values of the trainers' flags.
        schedule: float or `LearningRateSchedule`.
        paper_line_search: `"online"` or `"none"`, what `--line_search=auto` is with a paper's rule.
    """
    line_search = flags["line_search"]
    if line_search == "auto":
        published = flags["update_rule"] in ("fletcher_reeves", "polak_ribiere")
        line_search = paper_line_search if published else "none"
    preconditioner = flags["preconditioner"]
    return make_optimizer(
        flags["optimizer"],
        schedule,
        flags["weight_decay"],
        flags["lars_coefficient"],
        update_rule=flags["update_rule"],
        preconditioner=None if preconditioner == "none" else preconditioner,
        nesterov=flags["nesterov"],
        line_search=None if line_search == "none" else line_search,
    )


def spectral_peak(batch):
    """The default peak rate of `"spectral"`, a fraction of each kernel's norm.

    Small batches have noisier gradients, which want shorter steps. docs/choosing.md has the
    measurements.
    """
    return 0.064 * min(1.0, batch / 2048) ** 0.5


def make_schedule(kind, flags, plan):
    """The schedule that the trainers' flags ask for.

    Args:
        kind: class of `nlcg_tf.schedules`.
        flags: dict of values of the trainers' flags.
        plan: a `BatchPlan`.
    """
    factor, peak = flags["learning_rate_factor"], flags["peak_learning_rate"]
    if peak is None and (flags["optimizer"], flags["preconditioner"]) == ("nlcg", "spectral"):
        factor, peak = 1.0, spectral_peak(plan.global_batch_size) * factor
    sizes = plan.global_batch_size, plan.epochs, plan.updates_per_epoch
    return kind(*sizes, factor, peak, flags["decay"])


def cifar_line_search(global_batch_size):
    """The paper's runs on CIFAR-100 have a line search from a batch of 2,048 on."""
    return "online" if global_batch_size >= 2048 else "none"


def make_optimizer(name, schedule, weight_decay=0.0, lars_coefficient=None, **nlcg_arguments):
    """Makes an optimizer with the paper's settings.

    Args:
        name: one of `trained()`. RMSProp has decay 0.9, momentum 0.9 and epsilon 1.0. Momentum is
            that of Keras, "_tf1" that of TensorFlow 1.
        schedule: float or `LearningRateSchedule`.
        weight_decay: float, factor of sum(w^2), for LARS; for an optimizer that does not decay
            weights itself it is in the model's loss.
        lars_coefficient: float for LARS (0.001 by default) and NLCG (no scaling by default).
        **nlcg_arguments: for `nlcg_tf.NLCG`; other optimizers do not look at them.

    Raises:
        ValueError: for another name.
    """
    if name not in trained():
        raise ValueError(f"`name` must be one of {', '.join(trained())}. Received: name={name!r}")
    return OPTIMIZERS[name].make(schedule, weight_decay, lars_coefficient, **nlcg_arguments)
