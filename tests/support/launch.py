"""Starts programs and real Horovod workers."""

import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.support import forked
from trainers.engine.folder import read_metrics

# The launchers of the environment that runs the tests.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
ROOT = pathlib.Path(__file__).parents[2]
# Real images, where they are at hand; tests that need them skip without.
DATA = ROOT.parent / "shared" / "data"
CIFAR100 = DATA / "tensorflow_datasets"
# A fork that behaves as a Python of its own, see there; where it may not be a fork: sys.executable.
PYTHON = [sys.executable, "-IS", str(ROOT / "tests" / "support" / "forked.py")]
TRAINER = [*PYTHON, "-m", "trainers.cifar", "--depth=8"]
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
    own = {"PYTHONPATH": str(ROOT), "HOROVOD_LOG_LEVEL": "warning", forked.ADDRESS: server()[1]}
    return {**os.environ, **own, **variables}


@functools.cache
def server():
    """The process that forks, one for each process of pytest: it, which must be kept, and where."""
    if forked.ADDRESS in os.environ:
        return None, os.environ[forked.ADDRESS]
    return forked.start_server()


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
