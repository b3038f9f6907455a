"""The run folders of full-size runs: their records, and the state from which they go on."""

import contextlib
import os
import time

import jax
import keras
import numpy as np

from scripts.fullsize.training import Training
from trainers import flags as trainer_flags
from trainers.engine.folder import SUMMARY, RunFolder, read_flags, read_json

STATE = "state.npz"
BEST = "best"  # as a factor on the rate: that of the finished runs with other seeds
# Those of trainers.cifar alone, and what is none of the trainers' flags.
BESIDES = {"depth": None, "dataset": None, "training_examples": None, "precision": "float32"}
# Flags that are something else here.
ELSEWHERE = {"compression": "none", "dtype_policy": "float32"}


def configure(precision, cache):
    """Sets the precision of products, and where compiled programs are kept.

    Args:
        precision: `"float32"`, `"tf32"` or `"bfloat16"`.
        cache: path; runs that differ in the seed alone are compiled once.
    """
    names = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "highest"}
    jax.config.update("jax_default_matmul_precision", names[precision])
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")


def full_flags(name, given, per_step_batch_size=None, precision="float32"):
    """All flags of a run: those given, and the trainers' defaults.

    Raises:
        ValueError: for a flag that the trainers have not, or that means nothing here.
    """
    flags = {**BESIDES, **trainer_flags.defaults()}
    if unknown := [flag for flag in given if flag not in flags]:
        raise ValueError(f"{name}: --{unknown[0]} is no flag of trainers.cifar")
    flags.update(given)
    for flag, value in ELSEWHERE.items():
        if flags[flag] != value:
            raise ValueError(f"{name}: --{flag}={flags[flag]} is not for one device")
    if flags["depth"] is None or flags["dataset"] is None:
        raise ValueError(f"{name}: --dataset and --depth are needed")
    if per_step_batch_size:
        flags["per_worker_batch_size"] = per_step_batch_size
    flags["precision"] = precision
    return flags


def check_same(place, flags):
    """Checks that a run folder is of a run with these flags.

    Raises:
        ValueError: if one that decides the result was another.
    """
    saved = read_flags(place) or {}
    for name in sorted({*trainer_flags.DECISIVE, *BESIDES, "per_worker_batch_size"}):
        if flags[name] not in (BEST, saved.get(name)):
            raise ValueError(
                f"{place} is of a run with --{name}={saved.get(name)}, not {flags[name]}: "
                "choose another --folder"
            )


def best_factor(name, runs, places):
    """The factor on the rate with which another seed of the same run ended best.

    Args:
        name: of a run whose `learning_rate_factor` is `"best"`.
        runs: dict from names to runs.
        places: dict from names to run folders.

    Returns:
        float, or `None` while no such run is finished.
    """
    varied = dict.fromkeys(("learning_rate_factor", "seed"))
    kind, found = {**runs[name]["flags"], **varied}, {}
    for other, run in runs.items():
        factor = run["flags"]["learning_rate_factor"]
        summary = read_json(places[other] / SUMMARY)
        if factor != BEST and summary and {**run["flags"], **varied} == kind:
            found[factor] = max(summary["top1"], found.get(factor, 0.0))
    return max(found, key=found.get) if found else None


def saved_epochs(place):
    """How many epochs of a run are saved."""
    with contextlib.suppress(FileNotFoundError), np.load(place / STATE) as saved:
        return int(saved["epochs"])
    return 0


class Group:
    """Runs that differ in their seeds alone, from the same epoch on.

    Args:
        runs: dict from names to runs.
        places: dict from names to run folders.
        data: an `ImageFiles`.
    """

    def __init__(self, runs, places, data):
        self.names = list(runs)
        self.flags = [run["flags"] for run in runs.values()]
        self.places = [places[name] for name in self.names]
        seeds = [flags["seed"] for flags in self.flags]
        self.training = Training(self.flags[0], seeds, data)
        self.epochs = self.training.plan.epochs
        self.free = trainer_flags.FREE

    def train(self, deadline):
        """Trains to the end, or to the first epoch that ends after a deadline.

        Args:
            deadline: moment of `time.monotonic()`.

        Returns:
            Whether the runs are finished.
        """
        with contextlib.ExitStack() as stack:
            folders = [RunFolder(place, self.epochs) for place in self.places]
            for folder in folders:
                folder.lock()
                stack.callback(folder.close)
            state, done = self._restore()
            updates = done * self.training.plan.updates_per_epoch
            for folder, flags in zip(folders, self.flags):
                described = {"trainer": "scripts.fullsize", "classes": self.training.data.classes}
                folder.start({**described, **flags}, self.free, updates, done)
            for epoch in range(done, self.epochs):
                state = self._train_epoch(state, epoch, folders)
                self._save(state, epoch + 1)
                if epoch + 1 < self.epochs and time.monotonic() > deadline:
                    return False
            for folder, flags in zip(folders, self.flags):
                self._finish(folder, flags)
        return True

    def _train_epoch(self, state, epoch, folders):
        training, plan, began = self.training, self.training.plan, time.perf_counter()
        state, logs = training.train_epoch(state, epoch)
        seconds = time.perf_counter() - began
        every = self.flags[0]["evaluation_epochs"]
        tested = [{}] * len(folders)
        if epoch + 1 == self.epochs or (epoch + 1) % every == 0:
            tested = training.evaluate(state)
        images = plan.updates_per_epoch * plan.global_batch_size
        for folder, log, figures in zip(folders, logs, tested):
            first = epoch * plan.updates_per_epoch
            for i, loss in enumerate(log["loss"].tolist()):
                update = first + i + 1
                if update == 1 or update % self.flags[0]["log_steps"] == 0:
                    record = {"type": "step", "epoch": epoch + 1, "update": update, "loss": loss}
                    record["learning_rate"] = float(log["learning_rate"][i])
                    folder.append({**record, **self._diagnostics(log, i)})
            loss, correct = np.sum(log["sums"], axis=0, dtype=np.float64) / images
            record = {"type": "epoch", "epoch": epoch + 1, "update": first + plan.updates_per_epoch}
            record.update(images_per_second=len(folders) * images / seconds)
            record.update(loss=float(loss), train_top1=float(correct))
            folder.append({**record, **self._diagnostics(log, -1), **figures})
        names = ", ".join(self.names)
        accuracy = ", ".join(f"{t['top1']:.2%}" for t in tested if t)
        speed = len(folders) * images / seconds
        print(
            f"{names}: epoch {epoch + 1}/{self.epochs}  {accuracy}  {speed:.0f} images/s",
            flush=True,
        )
        return state

    def _diagnostics(self, log, i):
        """NLCG's, after one of the updates of an epoch."""
        if "reals" not in log:
            return {}
        optimizer = self.training.optimizer
        optimizer.reals.assign(log["reals"][i])
        optimizer.counts.assign(log["counts"][i])
        return optimizer.diagnostics()

    def _finish(self, folder, flags):
        plan = self.training.plan
        last = [record for record in folder.records if record["type"] == "epoch"][-1]
        summary = {key: value for key, value in last.items() if key != "type"}
        summary.update(updates=plan.updates, seed=flags["seed"], workers=1, skipped_images=0)
        summary.update(micro_steps=plan.micro_steps, global_batch_size=plan.global_batch_size)
        summary.update(parameters=self.training.model.count_params())
        summary.update(device=jax.devices()[0].device_kind)
        speeds = [r["images_per_second"] for r in folder.records if r["type"] == "epoch"]
        images = plan.updates_per_epoch * plan.global_batch_size
        summary["seconds"] = sum(images / speed for speed in speeds)
        folder.finish(summary)
        (folder.path / STATE).unlink(missing_ok=True)

    def _save(self, state, epochs):
        """Saves each run's own part of the state, so that any of them may go on."""
        leaves = jax.device_get(jax.tree.leaves(state))
        for i, place in enumerate(self.places):
            own = leaves if len(self.places) == 1 else [leaf[i] for leaf in leaves]
            partial = place / f"{STATE}.partial"
            with partial.open("wb") as file:
                np.savez(file, *own, epochs=epochs)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place / STATE)

    def _restore(self):
        """The state of all runs, and how many epochs of them are done.

        Raises:
            ValueError: if a saved state is of other flags.
        """
        state = self.training.initial_state()
        leaves, structure = jax.tree.flatten(state)
        found = []
        for place, flags in zip(self.places, self.flags):
            if not (place / STATE).exists():
                return state, 0
            check_same(place, flags)
            with np.load(place / STATE) as saved:
                found.append([saved[f"arr_{i}"] for i in range(len(leaves))])
                done = int(saved["epochs"])
        if len(found) == 1:
            leaves = found[0]
        else:
            leaves = [np.stack(parts) for parts in zip(*found)]
        return jax.tree.unflatten(structure, jax.device_put(leaves)), done
