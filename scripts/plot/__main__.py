"""Tables of run folders, and figures like the paper's: `python -m scripts.plot FOLDER --out=DIR`.

Of all runs below the folders, which may be sweeps, single runs or anything around them (or a
runs.csv of runs whose folders are gone), DIR gets

    runs.csv          one line a run, with its status
    table.md          top-1 of the weights and the averaged weights, over the seeds
    accuracy_batch    top-1 against batch size; accuracy_batch_tuned with the best rate for each
    accuracy_epochs   top-1 against the length of the training, where several were run
    loss_step, loss_seconds, learning_rate, diagnostics     over one run each, of the lowest seed

as PNG and SVG. Means are over the runs that finished; where others diverged or failed the marker is
open. `python -m scripts.plot --schedule=65536 --out=DIR` draws the paper's Figure 1, the learning
rate on ImageNet at that batch size, and needs no runs.
"""

import argparse
import sys

import numpy as np

from scripts.plot import figures, tables
from scripts.shared import runs as run_folders
from scripts.shared.style import styles
from trainers.engine.files import make_folder, path_of

IMAGENET_EXAMPLES = 1281167


def read_curves(runs):
    """The logged steps of one run for each optimizer and batch size.

    Of each it is the lowest seed that finished or diverged, at the common rate, of the length that
    most have.
    """
    runs = runs[runs["status"].isin(["finished", "diverged"])].dropna(subset=run_folders.POINT)
    if runs.empty:
        return {}
    runs, _ = tables.with_common_rate(runs)
    runs = runs[runs["epochs"] == runs["epochs"].mode()[0]].astype({"global_batch_size": int})
    curves = {}
    for _, run in runs.sort_values("seed", kind="stable").iterrows():
        key = run["optimizer"], run["global_batch_size"]
        if key in curves:
            continue
        steps, _ = run_folders.read_metrics(run["folder"], run["global_batch_size"])
        if len(steps):
            steps.attrs.update(optimizer=run["optimizer_flag"])
            steps.attrs.update(epochs=int(run["epochs"]), seed=int(run["seed"]))
            curves[key] = steps
    return curves


def draw_schedule(batch, lengths, out):
    from nlcg_tf.schedules import ImageNetSchedule

    per_epoch = max(1, IMAGENET_EXAMPLES // batch)
    rates = {
        epochs: np.asarray(
            ImageNetSchedule(batch, epochs, per_epoch)(np.arange(epochs * per_epoch))
        )
        for epochs in lengths
    }
    figures.draw_schedule(rates, per_epoch, batch, out)


def draw_runs(folders, out):
    runs = run_folders.read_runs(folders)
    run_folders.write_csv(runs, out / "runs.csv")
    count, runs = len(runs), tables.count_once(runs)
    if len(runs) < count:
        print(f"{count - len(runs)} runs repeat another's settings and seed and are left out")
    text = tables.table(runs)
    (out / "table.md").write_text(text)
    print(text)
    look = styles(list(runs["optimizer"].unique()))
    common, rate = tables.with_common_rate(runs)
    common = tables.summarise(common)
    if common["top1"].notna().any():
        title = tables.rate_title(rate)
        figures.draw_accuracy_batch(common, look, out, "accuracy_batch", title)
        figures.draw_accuracy_epochs(common, look, out)
    if tables.has_search(runs):
        best = tables.tuned(runs)
        figures.draw_accuracy_batch(best, look, out, "accuracy_batch_tuned", "tuned rate")
    curves = read_curves(runs)
    if curves:
        figures.draw_curves(curves, look, out)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plot", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "folders",
        nargs="*",
        type=path_of,
        metavar="FOLDER",
        help="holds runs, at any depth; or a runs.csv",
    )
    parser.add_argument("--out", type=path_of, required=True, help="folder of the figures")
    parser.add_argument("--schedule", type=int, metavar="BATCH", help="draw ImageNet's schedule")
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[90, 150, 180], help="with --schedule: lengths"
    )
    options = parser.parse_args()
    if bool(options.folders) == bool(options.schedule):
        parser.error("give folders, or --schedule=BATCH")
    try:
        make_folder(options.out)
        if options.schedule:
            draw_schedule(options.schedule, options.epochs, options.out)
        else:
            draw_runs(options.folders, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
