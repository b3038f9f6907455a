"""The figures of the study: losses, sensitivity to the rate, win and loss."""

import numpy as np
from matplotlib import pyplot

from scripts.curvature.ablation import KNOWN
from scripts.curvature.statistics import (
    POINTS,
    TITLES,
    by_optimizer,
    final_loss,
    quartiles,
    resample,
    worst_runs,
)
from scripts.shared import style

OVER_SEEDS = "median and quartiles over seeds"


def _panels(records, ylabel, xlabel):
    problems = [name for name in TITLES if by_optimizer(records, name)]
    figure, columns = style.panels(len(problems), width=5.4, height=3.0, across=2)
    for (axis,), problem in zip(columns, problems):
        axis.set_title(TITLES[problem])
        axis.set_yscale("log")
        axis.set(xlabel=xlabel, ylabel=ylabel)
    return figure, {problem: axis for problem, (axis,) in zip(problems, columns)}


def _look(name):
    return {**style.look(KNOWN[name]), "label": KNOWN[name].title, "markersize": 5}


def draw_losses(records, axis, out):
    """Loss against "updates" or "seconds": a panel a problem, median and quartiles over seeds."""
    xlabel = {"updates": "updates (gradient evaluations)", "seconds": "seconds"}[axis]
    figure, panels = _panels(records, "loss", xlabel)
    for problem, panel in panels.items():
        initial = 0.0
        for i, (name, (_, runs)) in enumerate(by_optimizer(records, problem).items()):
            end = quartiles([record["curve"][axis][-1] for record in runs])[1]
            grid = np.linspace(0, runs[0]["updates"] if axis == "updates" else end, POINTS + 1)
            losses = np.array([resample(record, axis, grid) for record in runs])
            initial = max(initial, np.median(losses[:, 0]))
            low, median, high = np.quantile(losses, [0.25, 0.5, 0.75], 0, method="inverted_cdf")
            look = _look(name)
            panel.plot(grid, median, markevery=(i % 9, 9), linewidth=1.4, **look)
            panel.fill_between(grid, low, high, color=look["color"], alpha=0.13, linewidth=0)
        panel.set_ylim(top=1.5 * initial)
        panel.set_xlim(left=0)
    style.save(figure, panels.values(), out, f"loss_{axis}", OVER_SEEDS)


def draw_sensitivity(records, out):
    """Final loss of the search's worse run against the rate; x: diverged; dotted: initial loss."""
    figure, panels = _panels(records, "final loss, worse of two seeds", "learning rate")
    for problem, panel in panels.items():
        groups = by_optimizer(records, problem)
        starts = [r["curve"]["loss"][0] for search, _ in groups.values() for r in search]
        initial = max(starts, default=1.0)
        for name, (search, _) in groups.items():
            if not search:
                continue
            worst = worst_runs(search)
            rates = np.array([record["rate"] for record in worst])
            losses = np.array([min(final_loss(record), 1.5 * initial) for record in worst])
            lost = np.array([record["diverged"] for record in worst], bool)
            look = _look(name)
            panel.plot(rates, losses, linewidth=1.4, markevery=np.flatnonzero(~lost), **look)
            panel.plot(rates[lost], losses[lost], "x", color=look["color"], markersize=6)
        panel.set_xscale("log")
        panel.set_ylim(top=2 * initial)
        panel.axhline(initial, color="black", linewidth=0.8, linestyle=":")
    style.save(figure, panels.values(), out, "sensitivity")


def draw_win_loss(records, out):
    """Each optimizer's final loss over NLCG's: a row a problem, median and quartiles over seeds."""
    problems = [name for name in TITLES if "nlcg" in by_optimizer(records, name)]
    height = 0.75 * len(problems) + 1.5
    figure, axis = pyplot.subplots(figsize=(7, height), layout="constrained")
    for row, problem in enumerate(problems):
        groups = by_optimizer(records, problem)
        unit = quartiles([final_loss(record) for record in groups["nlcg"][1]])[1]
        for i, (name, (_, runs)) in enumerate(groups.items()):
            ratios = np.array(quartiles([final_loss(record) for record in runs])) / unit
            ratios = np.minimum(ratios, 1000)  # and those of diverged runs
            place = row + 0.6 * ((i + 0.5) / len(groups) - 0.5)
            look = {**_look(name), "linestyle": ""}
            axis.plot(ratios[[0, 2]], [place, place], color=look["color"], linewidth=1.5)
            axis.plot(ratios[1], place, **look)
    axis.axvline(1, color=KNOWN["nlcg"].colour, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yticks(range(len(problems)), [TITLES[name] for name in problems])
    axis.invert_yaxis()
    axis.set_xlabel("final loss over NLCG's; right of the line NLCG ends lower")
    axis.grid(axis="y", visible=False)
    style.save(figure, [axis], out, "win_loss")
