"""Starts real Horovod workers."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# The launchers of the environment that runs the tests.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 240

needs_horovod = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is None, reason="Horovod is not installed"
)


def has_mpi():
    if importlib.util.find_spec("horovod") is None or shutil.which("mpirun") is None:
        return False
    command = [sys.executable, "-c", "import horovod.tensorflow as h; print(h.mpi_built())"]
    return "True" in subprocess.run(command, capture_output=True, text=True).stdout


def run(command, **environment):
    """Runs a command in the repository; returns the finished process with its output as text."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "HOROVOD_LOG_LEVEL": "error", **environment}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def horovodrun(*command, workers=2, **environment):
    return run(["horovodrun", "--gloo", "-np", workers, *command], **environment)


def mpirun(*command, workers=2):
    options = ["--allow-run-as-root", "--oversubscribe", "-np", workers]
    return run(["mpirun", *options, *command])
