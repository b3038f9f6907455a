"""The CIFAR trainer's runs on one GPU, or TPU, through Keras' JAX backend: many updates a call.

    python -m scripts.fullsize --export=DIR --dataset=cifar100 --data_dir=TFDS --config=FILE.yaml
    python -m scripts.fullsize --data=DIR --folder=runs/full --config=DIR/runs.json --minutes=9

The first, where TensorFlow is, writes the images and the list of runs as files; the second needs
JAX, Keras and NumPy alone. The definition is that of `scripts.sweep`, in YAML or as exported; its
runs are made in the order in which they stand there, and the run folders are those of the trainers:
`python -m scripts.plot FOLDER --out=DIR` draws them. A `learning_rate_factor` of `best` is that of
the finished run of the same kind with the highest top-1.

The same command goes on where it was stopped, after `--minutes` too: run by run, and inside a run
at an epoch. Exit status: 0 when all runs are done, 75 when there are some left, 2 for a definition
that cannot be run.
"""

import argparse
import json
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"

from scripts.fullsize import data as data_files
from trainers.engine.files import make_folder, path_of, write
from trainers.engine.folder import SUMMARY
from trainers.engine.preemption import EXIT_STATUS as SAVED

RUNS = "runs.json"


def parsed_options(words=None):
    description, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m scripts.fullsize",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--export", type=path_of, metavar="DIR", help="write data and runs")
    parser.add_argument("--dataset", default="cifar100", help="with --export")
    parser.add_argument("--data_dir", type=path_of, help="with --export: of TensorFlow Datasets")
    parser.add_argument("--config", type=path_of, required=True, help="definition of the runs")
    parser.add_argument("--data", type=path_of, help="what --export wrote")
    parser.add_argument("--folder", type=path_of, help="of the run folders")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="end after the epoch in which they pass"
    )
    parser.add_argument(
        "--per_step_batch_size", type=int, help="images that batch norm sees at once"
    )
    parser.add_argument("--seeds_together", type=int, default=1, help="runs side by side")
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    options = parser.parse_args(words)
    if not options.export and not (options.data and options.folder):
        parser.error("give --export, or --data and --folder")
    for name in ("minutes", "per_step_batch_size", "seeds_together"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} must be positive. Received: {value}")
    return options


def read_runs(path):
    """The runs of a definition, or those that were exported: name -> run.

    Raises:
        ValueError: if the file does not hold such.
        OSError: if it cannot be read.
    """
    if path.suffix != ".json":
        from scripts.sweep import definition

        return definition.expand(definition.from_file(path))
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config={path}: {error}") from None


def groups(names, runs, done, most):
    """Runs to be made side by side: neighbours that differ in the seed, and are equally far."""
    found = []
    for name in names:
        kind = {**runs[name]["flags"], "seed": None}, done[name]
        if found and found[-1][0] == kind and len(found[-1][1]) < most:
            found[-1][1].append(name)
        else:
            found.append((kind, [name]))
    return [group for _, group in found]


def make_runs(options):
    """Makes the runs that are not finished; returns whether all are now."""
    from scripts.fullsize.runs import (
        BEST,
        Group,
        best_factor,
        check_same,
        configure,
        full_flags,
        saved_epochs,
    )

    deadline = time.monotonic() + 60 * options.minutes
    configure(options.precision, options.folder / ".compiled")
    runs = read_runs(options.config)
    for name, run in runs.items():
        run["flags"] = full_flags(
            name, run["flags"], options.per_step_batch_size, options.precision
        )
    places = {name: options.folder / "runs" / name for name in runs}
    waiting = [name for name in runs if not (places[name] / SUMMARY).exists()]
    for name, run in runs.items():
        if name not in waiting:
            check_same(places[name], run["flags"])
    make_folder(options.folder)
    write(options.folder / "sweep.json", json.dumps(runs, indent=1) + "\n")
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} done before", flush=True)
    done = {name: saved_epochs(places[name]) for name in waiting}
    loaded = {}
    for i, names in enumerate(groups(waiting, runs, done, options.seeds_together)):
        if i and time.monotonic() > deadline:
            return False
        if runs[names[0]]["flags"]["learning_rate_factor"] == BEST:
            factor = best_factor(names[0], runs, places)
            if factor is None:
                raise ValueError(f"{names[0]}: no run with another seed is finished before it")
            for name in names:
                runs[name]["flags"]["learning_rate_factor"] = factor
        dataset = runs[names[0]]["flags"]["dataset"]
        if dataset not in loaded:
            loaded[dataset] = data_files.ImageFiles(options.data, dataset)
        group = Group({name: runs[name] for name in names}, places, loaded[dataset])
        if not group.train(deadline):
            return False
    return True


def main():
    options = parsed_options()
    try:
        if options.export:
            data_files.export(options.dataset, options.data_dir, options.export)
            write(options.export / RUNS, json.dumps(read_runs(options.config), indent=1) + "\n")
            print(f"written to {options.export}")
            return
        finished = make_runs(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if not finished:
        print("out of time: the same command goes on")
        raise SystemExit(SAVED)


if __name__ == "__main__":
    main()
