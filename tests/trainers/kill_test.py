"""Kills a training again and again and compares it, bit for bit, with one that was left alone.

    python -m tests.trainers.kill_test --kills=25 --workers 1 2
    python -m tests.trainers.kill_test --kills=5 --workers 2 -- trainers.imagenet --dataset=folder

Each round starts the same command (ResNet-8 on handwritten digits, or what follows `--`), with
`--deterministic`, as a process of its own, and kills it by SIGKILL: at a random moment, or while a
checkpoint is being written; with two workers either everything or one of them. At last the command
may finish. Its final checkpoint must hold the same bits, and its log the same figures, as those of
a run that was never killed. With `--cost` says too what `--deterministic` costs.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import psutil

from tests.support.launch import HOROVODRUN, PYTHON, environment
from trainers.engine.folder import read_metrics

TRAINING = ["trainers.cifar", "--depth=8", "--global_batch_size=256", "--per_worker_batch_size=64"]
TRAINING += ["--checkpoint_steps=2"]
# What may differ between two runs of the same training.
TIMES = ("images_per_second",)


def start(folder, workers, options, deterministic=True, python=(sys.executable,)):
    command = [*python, "-m", *options.training, f"--epochs={options.epochs}"]
    command += ["--log_steps=1", "--keep_checkpoints=3"]
    command += [f"--output_dir={folder}", f"--deterministic={deterministic}"]
    if workers > 1:
        command = [*map(str, HOROVODRUN), "-np", str(workers), *command]
    with pathlib.Path(f"{folder}.log").open("a") as log:
        return subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def finish(folder, workers, options, **arguments):
    process = start(folder, workers, options, python=PYTHON, **arguments)
    if process.wait():
        sys.exit(f"error: the run failed, see {folder}.log")


def kill(process, generator):
    """Kills everything, or one of two workers, whose launcher then ends the job."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [p for p in family if _is_worker(p)]
    victims = [*family, process]
    if len(workers) > 1 and generator.random() < 0.5:
        victims = [generator.choice(workers)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
    deadline = time.monotonic() + 60
    while not all(map(_has_ended, family)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _has_ended(process):
    """Also if nobody reaps it, as in containers: psutil would wait for that."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_worker(process):
    try:
        command = process.cmdline()
        return "python" in command[0] and any(word.startswith("trainers.") for word in command)
    except psutil.Error:
        return False


def wait(process, condition):
    """Waits until a condition holds; False if the process ended before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def wait_in_save(process, folder, generator):
    """Waits for a moment in one of the next saves."""
    partial = []
    for _ in range(generator.randint(1, 4)):
        if not wait(process, lambda old=partial: not any(p.exists() for p in old)):
            return False
        partial = wait_for_files(process, folder / "checkpoints", "partial-*")
        if not partial:
            return False
    time.sleep(generator.uniform(0, 0.01))
    return True


def wait_for_files(process, folder, pattern):
    """Waits for files of that name and returns them; an empty list if the process ended before."""
    found = []
    wait(process, lambda: found.extend(folder.glob(pattern)) or found)
    return found


def wait_in_training(process, folder, generator):
    """Waits for a moment of the start, or of the next 20 updates."""
    updates = generator.choice([0, 0, *range(1, 21)])
    if updates == 0:
        moment = time.monotonic() + generator.uniform(0, 6)
        return wait(process, lambda: time.monotonic() > moment)
    # A run begins by writing its log anew, up to the checkpoint from which it goes on.
    log = folder / "metrics.jsonl"
    old = log.stat().st_ino if log.exists() else None
    if not wait(process, lambda: log.exists() and log.stat().st_ino != old):
        return False
    lines = log.read_text().count("\n")
    if not wait(process, lambda: log.read_text().count("\n") >= lines + updates):
        return False
    time.sleep(generator.uniform(0, 0.05))
    return True


def final_state(folder):
    """The arrays of a run's last checkpoint by their names, and the figures of its log."""
    import tensorflow as tf

    newest = sorted((folder / "checkpoints").glob("update-*"))[-1]
    reader = tf.train.load_checkpoint(str(newest / "state"))
    names = [n for n in reader.get_variable_to_shape_map() if n != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    figures = [
        {k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(folder)
    ]
    return {name: reader.get_tensor(name) for name in names}, figures


def compare(folder, other):
    """Raises SystemExit if two runs differ in any bit of their final state or logs."""
    (arrays, figures), (other_arrays, other_figures) = final_state(folder), final_state(other)
    if arrays.keys() != other_arrays.keys() or not arrays:
        sys.exit("error: the runs saved different variables")
    for name, array in arrays.items():
        if np.asarray(array).tobytes() != np.asarray(other_arrays[name]).tobytes():
            sys.exit(f"error: {name} differs between {folder} and {other}")
    for record, other_record in zip(figures, other_figures, strict=True):
        if record != other_record:
            sys.exit(f"error: the logs differ: {record} and {other_record}")
    return len(arrays), len(figures)


def speed(folder):
    """Median images per second over the epochs, the first left out."""
    epochs = [record for record in read_metrics(folder) if record["type"] == "epoch"]
    return np.median([record["images_per_second"] for record in epochs[1:]])


def test(folder, workers, options, generator):
    undisturbed, killed = folder / f"undisturbed-{workers}", folder / f"killed-{workers}"
    finish(undisturbed, workers, options)
    done = in_saves = 0
    while done < options.kills:
        process = start(killed, workers, options)
        saving = generator.random() < 0.5
        if not (wait_in_save if saving else wait_in_training)(process, killed, generator):
            if (killed / "summary.json").exists():
                sys.exit(f"error: finished after {done} kills: give more --epochs")
            sys.exit(f"error: the run failed, see {killed}.log")
        kill(process, generator)
        done += 1
        in_saves += saving
        print(f"  {workers} worker(s), kill {done}/{options.kills}", flush=True)
    finish(killed, workers, options)
    arrays, figures = compare(undisturbed, killed)
    print(
        f"{workers} worker(s): {done} kills, {in_saves} of them inside a save: {arrays} arrays of "
        f"the final state and {figures} records of the log are the same, bit for bit"
    )
    return undisturbed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="what --deterministic costs")
    parser.add_argument("--folder", help="where to keep the runs; a temporary one by default")
    parser.add_argument("training", nargs="*", default=TRAINING, help="a trainer and its flags")
    options = parser.parse_args()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(options.seed)
    for workers in options.workers:
        undisturbed = test(folder, workers, options, generator)
        if not options.cost:
            continue
        usual = folder / f"usual-{workers}"
        finish(usual, workers, options, deterministic=False)
        share = speed(undisturbed) / speed(usual)
        print(f"{workers} worker(s): --deterministic trains at {share:.2f} of the usual speed")


if __name__ == "__main__":
    main()
