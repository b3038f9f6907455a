"""Sweeps: how runs that are killed, fail or diverge end."""

import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import pandas as pd
import psutil

from scripts.plot import tables
from scripts.shared import runs as run_reader
from tests.support.launch import PYTHON, ROOT, environment, records, run, wait_for
from tests.support.sweeps import DEFINITION, SWEEP, write

CORES = min(2, len(os.sched_getaffinity(0)))


# In place of the trainer, where the trainer's own work does not matter. The flag `optimizer` says
# how it ends.
STUB = """
import json, os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--"))
folder, kind = pathlib.Path(flags["output_dir"]), flags["optimizer"]
(folder / "flags.json").write_text(json.dumps({"flags": flags}))
(folder / "cores").write_text(json.dumps([sorted(os.sched_getaffinity(0)), os.getpid()]))
if kind == "failing":
    print("this is why"), sys.exit(3)
if kind == "killed":  # as Linux does when memory runs out
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "slow" and not (folder / "saved").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
    (folder / "ready").touch()
    time.sleep(60)
summary = {"loss": None if kind == "diverged" else 0.5, "test_loss": 0.5, "top1": 0.25}
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "summary.json").write_text(json.dumps(summary))
"""


def stub_definition(folder, *kinds):
    stub = folder / "stub.py"
    stub.write_text(STUB)
    return {
        "launcher": [sys.executable, str(stub)],
        "flags": {"global_batch_size": 128, "epochs": 1},
        "optimizers": {kind: {"optimizer": kind} for kind in kinds},
        "grid": [{"seed": 0}],
    }


def statuses(folder):
    return dict(pd.read_csv(folder / "runs.csv")[["run", "status"]].to_numpy())


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_failed_and_diverged_runs_are_recorded_and_the_others_run(tmp_path):
    folder = tmp_path / "sweep"
    config = write(tmp_path, stub_definition(tmp_path, "failing", "killed", "diverged", "well"))
    done = run([*SWEEP, f"--folder={folder}", config, f"--jobs={CORES}", "--discard-checkpoints"])
    expected = {
        "failing-128-e1-s0": "failed",
        "killed-128-e1-s0": "failed",
        "diverged-128-e1-s0": "diverged",
        "well-128-e1-s0": "finished",
    }
    assert statuses(folder) == expected and done.returncode == 1, done.stderr
    assert "failing-128-e1-s0: failed" in done.stdout and "    this is why" in done.stdout
    assert "1 finished, 1 diverged, 2 failed" in done.stdout
    assert not list(folder.glob("runs/*/checkpoints"))
    cores = [json.loads(file.read_text())[0] for file in folder.glob("runs/*/cores")]
    assert {len(part) for part in cores} == {len(os.sched_getaffinity(0)) // CORES}

    # Started again, nothing runs, until one asks for it.
    log = folder / "runs" / "failing-128-e1-s0" / "log.txt"
    again = run([*SWEEP, f"--folder={folder}"])
    assert again.returncode == 1 and log.read_text() == "this is why\n"
    run([*SWEEP, f"--folder={folder}", "--retry-failed"])
    assert statuses(folder) == expected and log.read_text() == "this is why\n" * 2

    # What cannot be run is not noted.
    known = (folder / "sweep.json").read_text()
    line = ["--optimizers", "adam", "--jobs=99"]
    done = run([*SWEEP, f"--folder={folder}", *line])
    assert done.returncode == 2 and "Received: 99" in done.stderr
    assert (folder / "sweep.json").read_text() == known

    # A run that has begun keeps its flags; others may join.
    line = ["--optimizers", "sgd", "--epochs", 2, "--", "--global_batch_size=128"]
    other = write(tmp_path, {**stub_definition(tmp_path, "well"), "flags": {"epochs": 1}})
    changed = [*SWEEP, f"--folder={folder}", other, "--", "--global_batch_size=128", "--depth=8"]
    done = run(changed)
    assert done.returncode == 2 and "well-128-e1-s0" in done.stderr
    assert "--depth was None, is 8" in done.stderr
    done = run([*SWEEP, f"--folder={folder}", f"--slurm={tmp_path / 'job.sh'}", *line])
    assert done.stdout.startswith("5 runs"), done.stderr


def test_sigterm_lets_the_runs_save_and_a_killed_sweep_leaves_none_behind(tmp_path):
    folder, ready = tmp_path / "sweep", tmp_path / "sweep" / "runs" / "slow-128-e1-s0" / "ready"
    config = write(tmp_path, stub_definition(tmp_path, "slow", "well"))
    command, log = [*SWEEP, f"--folder={folder}", config], tmp_path / "log"

    def until_ready():
        with log.open("a") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=file, stderr=file
            )
        wait_for(ready.exists, process, log)
        return process

    process = until_ready()
    refused = run(command)
    assert refused.returncode == 2 and "another sweep is using" in refused.stderr
    process.kill()
    process.wait()
    child = json.loads((ready.parent / "cores").read_text())[1]
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)

    ready.unlink()
    process = until_ready()
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert "stopped: the same command goes on" in log.read_text()
    assert set(statuses(folder).values()) == {"unfinished"}

    # The rest as a SLURM array would do it.
    script = tmp_path / "job.sh"
    run([*command, f"--slurm={script}"])
    assert "#SBATCH --array=0-1\n" in script.read_text()
    for index in (0, 1):
        done = run(["bash", script], SLURM_ARRAY_TASK_ID=str(index))
        assert done.returncode == 0, done.stderr
    assert set(statuses(folder).values()) == {"finished"}


def test_a_slurm_task_that_is_told_to_stop_goes_back_into_the_queue(tmp_path):
    folder = tmp_path / "sweep"
    config = write(tmp_path, stub_definition(tmp_path, "slow"))
    script, told = tmp_path / "job.sh", tmp_path / "told"
    run([*SWEEP, f"--folder={folder}", config, f"--slurm={script}"])
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {told}\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    log = tmp_path / "log"
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", script],
            env=environment(SLURM_ARRAY_TASK_ID="0", **variables),
            stdout=file,
            stderr=file,
        )
    wait_for((folder / "runs" / "slow-128-e1-s0" / "ready").exists, process, log)
    process.terminate()
    assert process.wait() == 75, log.read_text()
    assert told.read_text() == "requeue 7\n"


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(tmp_path):
    """With the real trainer, which goes on from its checkpoints."""
    flags = {"dataset": "digits", "depth": 8, "epochs": 3, "global_batch_size": 256, "seed": 0}
    flags.update(deterministic=True, log_steps=1, checkpoint_steps=2)
    definition = {"flags": flags, "optimizers": DEFINITION["optimizers"], "launcher": PYTHON}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    command = [*SWEEP, write(tmp_path, definition), f"--jobs={CORES}"]
    done = run([*command, f"--folder={undisturbed}"])
    assert done.returncode == 0, done.stdout + done.stderr

    # The other sweep has come to its second run when it is killed.
    first = pathlib.Path("runs", "Momentum-256-e3-s0")
    shutil.copytree(undisturbed / first, killed / first)
    command.append(f"--folder={killed}")
    run_folder, log = killed / "runs" / "NLCG-FR-256-e3-s0", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file)
    wait_for(lambda: len(records(run_folder, "step")) >= 5, process, log)
    process.kill()
    process.wait()
    assert not (run_folder / "summary.json").exists()
    done = run(command)
    assert done.returncode == 0 and "2 runs, 1 done before" in done.stdout, done.stderr
    assert "resuming from" in (run_folder / "log.txt").read_text()

    found = [run_reader.read_runs([folder]) for folder in (killed, undisturbed)]
    assert list(found[1]["status"]) == ["finished", "finished"]
    same = ["run", "optimizer", *run_reader.SETTINGS, "status", *run_reader.FIGURES[:8]]
    pd.testing.assert_frame_equal(
        found[0][same], found[1][same], check_exact=True, check_dtype=False
    )
    assert tables.table(found[0]) == tables.table(found[1])
