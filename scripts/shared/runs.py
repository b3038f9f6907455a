"""Run folders read back as pandas tables: one of all runs, and the log of each."""

import math
import os
import pathlib

import numpy as np
import pandas as pd

from trainers.engine.files import write
from trainers.engine.folder import (
    BOARD,
    CHECKPOINTS,
    DESCRIBED,
    FLAGS,
    SUMMARY,
    read_flags,
    read_json,
)
from trainers.engine.folder import read_metrics as read_records
from trainers.flags import FREE
from trainers.optimizers.choice import OPTIMIZERS, flags_of

SWEEP_FILE = "sweep.json"
FAILED_FILE = "failed.json"
STATUSES = ("finished", "diverged", "failed", "unfinished")
# Flags that are the axes of a comparison, and how they stand in a run's name.
AXES = {"global_batch_size": "", "epochs": "e", "learning_rate_factor": "f"}
AXES |= {"peak_learning_rate": "p", "seed": "s"}
SETTINGS = list(AXES)
FIGURES = ["top1", "top5", "averaged_top1", "averaged_top5", "train_top1", "loss", "test_loss"]
FIGURES += ["updates", "seconds", "images_per_second", "workers", "peak_memory_bytes"]
POINT = ["optimizer", "global_batch_size", "epochs"]
# The columns of a table of runs.
TEXTS = ["run", "optimizer", "status", "optimizer_flag", "git_revision", "folder"]
NUMBERS = [*SETTINGS, *FIGURES, "exit_status"]
# What does not tell two kinds of run apart, besides the flags that are free.
NO_VARIANT = {*SETTINGS, "optimizer", "flagfile", *DESCRIBED}


def status(folder):
    """One of `STATUSES`."""
    if (folder / FAILED_FILE).exists():
        return "failed"
    summary = read_json(folder / SUMMARY)
    if not summary:
        return "unfinished"
    # The training loss is from before the last update.
    losses = [summary.get("loss"), summary.get("test_loss")]
    finite = all(isinstance(loss, (int, float)) and math.isfinite(loss) for loss in losses)
    return "finished" if finite else "diverged"


def read_runs(places):
    """All runs below some folders, those of a sweep that have not begun too, and of CSV files.

    Args:
        places: paths of folders, and of files that `write_csv` wrote, whose folders may be gone.

    Returns:
        DataFrame, one line a run: its folder, optimizer (with the flags in which runs of the same
        optimizer differ otherwise), status, settings and the figures of its summary. Its
        `rate` is "factor 4", on the schedule's, or the schedule's peak, "peak 0.03".

    Raises:
        ValueError: if a folder is not there, a file not of runs, or none holds a run.
    """
    files = [pathlib.Path(place) for place in places if str(place).endswith(".csv")]
    folders = [place for place in places if pathlib.Path(place) not in files]
    tables = [_read_csv(file) for file in files]
    if folders:
        tables.append(_read_folders(folders))
    runs = pd.concat(tables, ignore_index=True)
    factor, peak = (
        runs[name].map(f"{word} {{:g}}".format, na_action="ignore")
        for name, word in (("learning_rate_factor", "factor"), ("peak_learning_rate", "peak"))
    )
    runs["rate"] = peak.where(peak.notna(), factor)
    runs["order"] = runs["optimizer"].map(_order)
    runs = runs.sort_values(["order", *POINT, *SETTINGS[2:]], ignore_index=True)
    return runs.drop(columns="order")


def _read_csv(file):
    try:
        runs = pd.read_csv(file, dtype=dict.fromkeys(TEXTS, str))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    runs = runs if "peak_learning_rate" in runs else runs.assign(peak_learning_rate=math.nan)
    if missing := {*TEXTS, *NUMBERS} - set(runs):
        raise ValueError(f"{file} is not of runs: it has no column {', '.join(sorted(missing))}")
    if unknown := set(runs["status"]) - set(STATUSES):
        raise ValueError(
            f"{file}: status must be one of {', '.join(STATUSES)}. Received: {unknown.pop()}"
        )
    for column in NUMBERS:
        numbers = pd.to_numeric(runs[column], errors="coerce")
        if len(texts := runs[column][numbers.isna()].dropna()):
            raise ValueError(f"{file}: {column} must be a number. Received: {texts.iloc[0]}")
        runs[column] = numbers
    return runs


def _read_folders(folders):
    found, sweeps = set(), set()
    for folder in map(pathlib.Path, folders):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        # Unlike `rglob`, `walk` passes over what is removed meanwhile, such as old checkpoints.
        for name, inner, files in os.walk(folder.resolve()):
            inner[:] = set(inner) - {CHECKPOINTS, BOARD}
            place = pathlib.Path(name)
            if FLAGS in files and read_flags(place) is not None:
                found.add(place)
                sweeps.add(place.parents[1] / SWEEP_FILE)
            if SWEEP_FILE in files:
                sweeps.add(place / SWEEP_FILE)
    defined = {}
    for file in sweeps:
        for name, run in read_json(file).items():
            if not isinstance(run, dict) or not isinstance(run.get("flags"), dict):
                continue  # another program's
            defined[file.parent / "runs" / name] = run
    # Those defined outside the folders asked for are not asked for.
    found |= {run for run in defined if any(run.is_relative_to(f) for f in _resolved(folders))}
    if not found:
        raise ValueError(f"no run in {', '.join(map(str, folders))}")
    flags = {run: _flags(run, defined.get(run, {})) for run in sorted(found)}
    names = {
        run: defined.get(run, {}).get("optimizer") or _display_name(flags[run]) for run in flags
    }
    free = {*FREE, *(name for run in flags for name in read_json(run / FLAGS).get("free", []))}
    names = _with_variants(names, flags, free)
    runs = pd.DataFrame([_record(run, names[run], flags[run]) for run in flags])
    for column in SETTINGS + FIGURES:
        # What is no number, as a seed of a run that failed for it, is left out.
        runs[column] = pd.to_numeric(runs[column], errors="coerce")
    return runs


def read_metrics(folder, batch):
    """The logged steps and the epochs of a run, two DataFrames.

    The steps have the seconds of training before them, which follow from the epochs' throughput:
    evaluation and checkpoints are not in them.
    """
    records = read_records(folder)
    needed = {"step": ["update"], "epoch": ["update", "images_per_second"]}
    steps, epochs = (
        pd.DataFrame([r for r in records if r.get("type") == kind and _has_numbers(r, keys)])
        for kind, keys in needed.items()
    )
    if len(steps):
        numbers = steps.columns.drop("type")
        # A divergence's null; a column of them alone would not be of numbers.
        steps[numbers] = steps[numbers].apply(pd.to_numeric)
        steps["seconds"] = math.nan
    if len(steps) and len(epochs):
        updates = [0, *epochs["update"]]
        seconds = epochs["update"].diff().fillna(epochs["update"]) * batch
        seconds = [0, *(seconds / epochs["images_per_second"]).cumsum()]
        inside = steps["update"] <= updates[-1]
        steps.loc[inside, "seconds"] = np.interp(steps["update"][inside], updates, seconds)
    return steps, epochs


def _has_numbers(record, keys):
    return all(isinstance(record.get(key), (int, float)) for key in keys)


def write_csv(runs, path):
    """Writes a table so that no reader meets half of it."""
    write(path, runs.to_csv(index=False))


def _resolved(folders):
    return [pathlib.Path(folder).resolve() for folder in folders]


def _flags(run, definition):
    return {**definition.get("flags", {}), **(read_flags(run) or {})}


def _record(run, name, flags):
    summary, described = read_json(run / SUMMARY), read_json(run / FLAGS)
    peak = flags.get("peak_learning_rate")
    here = pathlib.Path.cwd()
    return {
        "run": run.name,
        "optimizer": name,
        **{key: flags.get(key) for key in SETTINGS},
        "learning_rate_factor": None if peak else flags.get("learning_rate_factor", 1.0),
        "seed": flags.get("seed", 0),
        "status": status(run),
        "exit_status": read_json(run / FAILED_FILE).get("exit_status"),
        **{key: summary.get(key) for key in FIGURES},
        "optimizer_flag": flags.get("optimizer"),
        "git_revision": described.get("git_revision"),
        "folder": str(run.relative_to(here) if run.is_relative_to(here) else run),
    }


def _display_name(flags):
    for name, choice in OPTIMIZERS.items():
        if all(flags.get(key, value) == value for key, value in flags_of(name).items()):
            return choice.title
    return str(flags.get("optimizer"))


def _with_variants(names, flags, free):
    """Runs of one name that differ in more than the settings must not be averaged."""
    varying = {}
    for run, name in names.items():
        for key, value in flags[run].items():
            if key not in NO_VARIANT and key not in free:
                values = varying.setdefault(name, {}).setdefault(key, set())
                values.add(_number(value))
    return {
        run: " ".join(
            [name]
            + [
                f"{key}={_number(flags[run][key])}"
                for key, values in varying.get(name, {}).items()
                if len(values) > 1 and key in flags[run]
            ]
        )
        for run, name in names.items()
    }


def _number(value):
    """A flag of a run that has not begun may still be text: "1e-4" is 0.0001."""
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value)
    except (TypeError, ValueError):
        return str(value)


def _order(name):
    """The place in `OPTIMIZERS` of a name, which may have flags behind it."""
    titles = enumerate(choice.title for choice in OPTIMIZERS.values())
    return next((i for i, t in titles if f"{name} ".startswith(f"{t} ")), len(OPTIMIZERS))
