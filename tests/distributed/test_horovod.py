"""Two real workers: the checks of the other files, and the CIFAR trainer under each launcher."""

import importlib.util
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.support.launch import (
    PYTHON,
    ROOT,
    TRAINER,
    has_mpi,
    horovodrun,
    mpirun,
    needs_horovod,
    run,
)
from tests.trainers import kill_test

FILES = sorted(pathlib.Path(__file__).parent.glob("checks_*.py"))
CHECKS = [name for f in FILES for name in re.findall(r"^def (check_\w+)", f.read_text(), re.M)]
LAUNCHERS = {
    "alone": lambda *command: run(command),
    "horovodrun": lambda *command: run(["horovodrun", "--gloo", "-np", 2, *command]),
    "mpirun": mpirun,
}


@pytest.fixture(scope="module")
def outcome():
    return horovodrun(sys.executable, "-m", "tests.distributed.run_checks")


@needs_horovod
@pytest.mark.parametrize("check", CHECKS)
def test_two_workers(outcome, check):
    passed = re.findall(rf"\[(\d)\]<stdout>:passed {check}$", outcome.stdout, re.M)
    assert sorted(passed) == ["0", "1"], outcome.stdout[-2000:] + outcome.stderr[-8000:]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_trainer_under_each_launcher(launcher, tmp_path):
    if launcher == "horovodrun" and importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed")
    if launcher == "mpirun" and not has_mpi():
        pytest.skip("Horovod is not built with MPI")
    folder = tmp_path / "run"
    flags = ["--global_batch_size=128", "--per_worker_batch_size=32", f"--output_dir={folder}"]
    flags += ["--depth=8", "--epochs=2", "--line_search=online"]
    result = LAUNCHERS[launcher](sys.executable, "-m", "trainers.cifar", *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    summary = json.loads((folder / "summary.json").read_text())
    workers = 1 if launcher == "alone" else 2
    assert (summary["workers"], summary["micro_steps"]) == (workers, 4 // workers)
    assert summary["updates"] == 22
    # Worker 0 alone speaks, one line an epoch since this is no terminal.
    lines = [line for line in result.stdout.splitlines() if "epoch " in line]
    assert re.search(r"beta \d\.\d+  learning-rate scale \d\.\d+  cosine \d", lines[-1])
    assert len(lines) == 2 and not any("[1]<stdout>" in line for line in result.stdout.splitlines())


@needs_horovod
def test_memory_does_not_grow_with_the_batch(tmp_path):
    """98,304 images in an update, through virtual batching, in the memory of 2,048."""
    peaks = []
    # Within the first micro-steps allocators take some percent more.
    for batch, updates in ((2048, 16), (98304, 1)):
        flags = [f"--global_batch_size={batch}", "--per_worker_batch_size=1024"]
        flags += [f"--epochs={updates}", f"--evaluation_epochs={updates}", "--image_size=4"]
        result = horovodrun(*TRAINER, *flags, f"--output_dir={tmp_path / str(batch)}")
        assert result.returncode == 0, result.stderr[-4000:]
        summary = json.loads((tmp_path / str(batch) / "summary.json").read_text())
        assert summary["micro_steps"] == batch // 2048 and summary["updates"] == updates
        peaks.append(summary["peak_memory_bytes"])
    assert abs(peaks[1] / peaks[0] - 1) < 0.05, peaks


@needs_horovod
def test_killed_runs_end_as_if_they_had_been_left_alone(tmp_path):
    """A short version of the script: a kill, two workers, the same bits at the end.

    With shards, which are gathered for each checkpoint. test_cifar.py compares whole states.
    """
    command = ["-m", "tests.trainers.kill_test", "--kills=1", "--epochs=5", "--seed=1"]
    command += ["--workers", "2", "--folder", tmp_path, "--"]
    command += [*kill_test.TRAINING, "--shard_optimizer"]
    result = run([*PYTHON, *command])
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 worker(s): 1 kills" in result.stdout and "bit for bit" in result.stdout


@needs_horovod
def test_a_run_goes_on_with_its_optimizer_divided_otherwise(tmp_path):
    """Whole on one worker, sharded on two, and the other way round: one layout of checkpoints."""
    command = [*TRAINER, "--epochs=2", "--checkpoint_steps=5", "--keep_checkpoints=9"]
    command += ["--global_batch_size=128", "--per_worker_batch_size=64"]

    def weights(folder):
        newest = sorted((folder / "checkpoints").iterdir())[-1]
        assert newest.name == "update-00000022-epoch-0002"
        reader = tf.train.load_checkpoint(str(newest / "state"))
        shapes = reader.get_variable_to_shape_map()
        names = sorted(name for name in shapes if name.startswith("averages"))
        return shapes, np.concatenate([reader.get_tensor(name).ravel() for name in names])

    whole, folder = tmp_path / "whole", tmp_path / "divided"
    assert run([*command, f"--output_dir={whole}"]).returncode == 0
    shapes, expected = weights(whole)
    shutil.copytree(whole, folder)
    for launch, flags, first in ((horovodrun, ["--shard_optimizer"], 10), (run, [], 20)):
        for path in (folder / "checkpoints").glob("update-*"):
            if int(path.name[7:15]) > first:
                shutil.rmtree(path)
        flags = [*command, *flags, f"--output_dir={folder}"]
        result = horovodrun(*flags) if launch is horovodrun else run(flags)
        assert result.returncode == 0, result.stderr[-4000:]
        assert f"epochs, {first} done" in result.stdout
        found_shapes, found = weights(folder)
        assert found_shapes == shapes
        difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 0 < difference < 1e-3, difference


@needs_horovod
def test_workers_that_do_not_see_each_other_are_refused(tmp_path):
    """A launcher whose processes Horovod cannot connect would train them apart."""
    result = run([*TRAINER, f"--output_dir={tmp_path}"], PMI_SIZE="2")
    assert result.returncode != 0
    assert "2 processes were launched, but Horovod connects 1" in result.stderr


def test_without_horovod_one_clear_sentence(tmp_path):
    (tmp_path / "horovod.py").write_text("raise ImportError('no such build')")
    code = f"""
import sys
from trainers.engine.imports import import_tensorflow
import_tensorflow()
sys.path.insert(0, {str(tmp_path)!r})
import nlcg_tf.horovod"""
    result = run([*PYTHON, "-c", code])
    assert "nlcg_tf.horovod needs Horovod built for this TensorFlow" in result.stderr
    assert "scripts/setup.sh" in result.stderr.splitlines()[-1]
    assert (ROOT / "scripts" / "setup.sh").is_file()
