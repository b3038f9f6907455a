"""Figures of single runs and of many: final losses, good rates, quartiles."""

import math

import numpy as np

from scripts.curvature.ablation import KNOWN

POINTS = 50  # of a curve, besides the one before the first update
SEARCH_SEEDS = (0, 1)
TOLERANCE = 1.1  # final losses up to this times the best count as good
TITLES = {
    "autoencoder": "autoencoder, full batch",
    "autoencoder_256": "autoencoder, batch 256",
    "poisson": "PINN, Poisson, full batch",
    "burgers": "PINN, Burgers, full batch",
    "resnet_plain": "ResNet-8 without batch norm, batch 128",
    "adding": "tanh RNN, adding problem, batch 100",
}


def final_loss(record):
    """Infinite where a run ended without a finite one."""
    return math.inf if record["final_loss"] is None else record["final_loss"]


def worst_runs(search):
    """The run with the highest final loss of each rate, in the order of the rates."""
    rates = sorted({record["rate"] for record in search})
    return [
        max((r for r in search if r["rate"] == rate), key=lambda r: (r["diverged"], final_loss(r)))
        for rate in rates
    ]


def best_rate(search):
    """The rate whose worst run is best: one that works for one seed alone is not chosen."""
    best = min(worst_runs(search), key=lambda record: (record["diverged"], final_loss(record)))
    return best["rate"]


def quartiles(values):
    """Lower quartile, median (of two in the middle the upper one) and upper quartile.

    They are values that occurred, so infinity may be one.
    """
    values = np.sort(np.asarray(values, float))
    low, high = np.quantile(values, [0.25, 0.75], method="inverted_cdf")
    return [float(low), float(values[len(values) // 2]), float(high)]


def first_reach(record, target):
    """(updates, seconds) at the first point of the curve with that loss or less, or infinities."""
    curve = record["curve"]
    for updates, seconds, loss in zip(curve["updates"], curve["seconds"], curve["loss"]):
        if loss is not None and loss <= target:
            return updates, seconds
    return math.inf, math.inf


def rate_range(search):
    """How freely the rate may be chosen, from the runs of the search.

    Returns:
        Lowest and highest of the neighbouring rates around the best one whose final loss is at
        most `TOLERANCE` times the best, and whether the range ends with the grid, so that it may
        be wider.
    """
    worst = worst_runs(search)
    rates = [r["rate"] for r in worst]
    losses = [math.nan if r["diverged"] else final_loss(r) for r in worst]
    low = high = rates.index(best_rate(search))
    limit = TOLERANCE * losses[low]
    while low > 0 and losses[low - 1] <= limit:
        low -= 1
    while high < len(rates) - 1 and losses[high + 1] <= limit:
        high += 1
    return rates[low], rates[high], low == 0 or high == len(rates) - 1


def resample(record, axis, grid):
    """The curve's loss at some values of "updates" or "seconds": that of the last point before."""
    losses = [math.inf if loss is None else loss for loss in record["curve"]["loss"]]
    places = np.searchsorted(record["curve"][axis], grid, side="right") - 1
    return np.array(losses)[places]


def by_optimizer(records, problem):
    """name -> (runs of the search, runs with the best rate), in the order of `KNOWN`."""
    groups = {}
    for name in KNOWN:
        runs = [r for r in records if r["problem"] == problem and r["optimizer"] == name]
        if runs:
            search = [r for r in runs if name != "lbfgs" and r["seed"] in SEARCH_SEEDS]
            groups[name] = search, [r for r in runs if r not in search]
    return groups


def target_loss(groups):
    """The median final loss of Adam, or `None` without Adam or where its median run diverged."""
    if "adam" not in groups:
        return None
    target = quartiles([final_loss(record) for record in groups["adam"][1]])[1]
    return target if math.isfinite(target) else None
