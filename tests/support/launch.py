"""Starts real Horovod workers."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from trainers.engine.folder import read_metrics

# The launchers of the environment that runs the tests.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
ROOT = pathlib.Path(__file__).parents[2]
# Real images, where they are at hand; tests that need them skip without.
DATA = ROOT.parent / "shared" / "data"
CIFAR100 = DATA / "tensorflow_datasets"
TRAINER = [sys.executable, "-m", "trainers.cifar", "--depth=8"]
HOROVODRUN = [sys.executable, ROOT / "tests" / "support" / "horovodrun.py", "--gloo"]
TIMEOUT = 480  # seconds of a command; a machine with other work on it takes twice its usual time

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed"
)


def has_mpi():
    if importlib.util.find_spec("horovod") is None or shutil.which("mpirun") is None:
        return False
    command = [sys.executable, "-c", "import horovod.tensorflow as h; print(h.mpi_built())"]
    return "True" in subprocess.run(command, capture_output=True, text=True).stdout


def environment(**variables):
    return {**os.environ, "PYTHONPATH": str(ROOT), "HOROVOD_LOG_LEVEL": "warning", **variables}


def run(command, **variables):
    """Runs a command in the repository; returns the finished process with its output as text."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def run_each(module, cases, folder):
    """Runs `python -m module` with each of several lists of flags, one after another.

    Each is a fork of one process: importing TensorFlow takes longer than all that they do.

    Returns:
        A list of finished processes, with stdout and stderr together as text.
    """
    code = f"""
import gc, os, runpy, sys
import trainers.engine.run
gc.freeze()  # nothing of this is looked through again when a fork ends
for i, flags in enumerate({cases!r}):
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        continue
    output = os.open(f"{folder}/output-{{i}}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = ["-m", *flags]
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
    sys.exit()
"""
    result = run([sys.executable, "-u", "-c", code])
    assert result.returncode == 0, result.stderr
    return [
        subprocess.CompletedProcess(
            flags, int(status), pathlib.Path(folder, f"output-{i}").read_text()
        )
        for i, (flags, status) in enumerate(zip(cases, result.stdout.split(), strict=True))
    ]


def horovodrun(*command, workers=2, **variables):
    return run([*HOROVODRUN, "-np", workers, *command], **variables)


def mpirun(*command, workers=2):
    options = ["--allow-run-as-root", "--oversubscribe", "-np", workers]
    return run(["mpirun", *options, *command])


def records(folder, kind):
    """The "step" or "epoch" records of a run so far."""
    return [record for record in read_metrics(folder) if record["type"] == kind]


def wait_for(condition, process, log):
    """Waits until a condition holds; fails if the process ends before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
