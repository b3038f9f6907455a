"""README's picture: where NLCG wins and where it loses, from the results of two studies.

    python -m scripts.plot.front          reads results/*/runs.csv, writes results/front.png

Above, test accuracy with batch norm on CIFAR-100 against the batch. Below, six small problems where
curvature matters: each optimizer's final loss over that of NLCG's default.
"""

import pathlib

import pandas as pd
from matplotlib import pyplot

from scripts.curvature.statistics import SEARCH_SEEDS, TITLES, quartiles
from scripts.plot import tables
from scripts.shared import runs as run_reader
from scripts.shared import style
from trainers.optimizers import choice

RESULTS = pathlib.Path(__file__).parents[2] / "results"
ON_CIFAR = ("nlcg_spectral", "muon", "muon_norm", "adam", "nesterov_tf1", "nlcg_fr")
HIGHEST = 1000  # of a ratio; beyond, and for runs that diverged, the marker stands at the edge


def _look(name):
    known = choice.OPTIMIZERS[name]
    return {**style.look(known), "label": known.title, "markersize": 7}


def draw_ratios(axis, runs):
    """Median final losses over those of NLCG, a row a problem."""
    final = runs[~((runs["optimizer"] != "lbfgs") & runs["seed"].isin(SEARCH_SEEDS))]
    final = final.assign(final_loss=final["final_loss"].fillna(float("inf")))
    medians = final.groupby(["problem", "optimizer"])["final_loss"].apply(
        lambda losses: quartiles(losses)[1]
    )
    problems = [problem for problem in TITLES if (problem, "nlcg") in medians]
    for name in [name for name in choice.OPTIMIZERS if name in set(runs["optimizer"])]:
        rows = [i for i, problem in enumerate(problems) if (problem, name) in medians]
        ratios = [
            min(HIGHEST, medians[problems[i], name] / medians[problems[i], "nlcg"]) for i in rows
        ]
        axis.plot(ratios, rows, **{**_look(name), "linestyle": "none"})
    axis.axvline(1, color=choice.OPTIMIZERS["nlcg"].colour, linewidth=1)
    axis.set_xscale("log")
    labels = [",\n".join(TITLES[name].rsplit(", ", 1)) for name in problems]
    axis.set_yticks(range(len(problems)), labels, fontsize=10)
    axis.invert_yaxis()
    axis.set_xlabel("final training loss over NLCG's: right of the line NLCG is better")
    axis.annotate("and beyond", (HIGHEST, 1.02), xycoords=("data", "axes fraction"), ha="right")


def draw_accuracy(axis, runs):
    """Top-1 at the best rate of each optimizer against the batch."""
    best = tables.tuned(tables.count_once(runs))
    for name in ON_CIFAR:
        part = best[best["optimizer"] == choice.OPTIMIZERS[name].title]
        part = part[part["epochs"] == runs["epochs"].mode()[0]].sort_values("global_batch_size")
        if part.empty:
            continue
        axis.errorbar(
            part["global_batch_size"],
            100 * part["top1"],
            100 * part["top1_std"].fillna(0),
            capsize=3,
            **_look(name),
        )
    axis.set_xscale("log", base=2)
    batches = sorted(best["global_batch_size"].unique())
    axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axis.set(xlabel="batch", ylabel="test accuracy at the best rate (%)")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower left", ncols=2, fontsize=10)


def main():
    with pyplot.rc_context({"font.size": 11}):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 7.6), layout="constrained")
        draw_accuracy(above, run_reader.read_runs([RESULTS / "cifar100" / "runs.csv"]))
        above.set_title("CIFAR-100, ResNet-8 with batch norm, 6 epochs", loc="left")
        draw_ratios(below, pd.read_csv(RESULTS / "curvature" / "runs.csv"))
        below.set_title("Six problems without batch norm", loc="left")
        below.legend(loc="upper right", fontsize=10, bbox_to_anchor=(1, 0.93))
        figure.savefig(RESULTS / "front.png", dpi=140)
    print(RESULTS / "front.png")


if __name__ == "__main__":
    main()
