"""The full-size study through JAX: the TensorFlow trainer's training, and it goes on."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import yaml

from tests.support.launch import PYTHON, ROOT, environment, run
from trainers.engine.folder import read_flags, read_json, read_metrics

if importlib.util.find_spec("jax") is None:  # to import it here takes seconds
    pytest.skip("JAX is not installed", allow_module_level=True)
FLAGS = {"dataset": "digits", "depth": 8, "per_worker_batch_size": 8, "log_steps": 1}
# The trainer itself, on images that are not augmented: where it begins, and 20 updates later.
TENSORFLOW = """
import json, sys
import numpy as np
import tensorflow as tf
from absl import flags
from trainers import cifar
from trainers.engine.cluster import OneProcess
from trainers.engine.plan import make_plan
from trainers.engine.run import _make_trainer

flags.FLAGS(["x", *json.loads(sys.argv[2])])
tf.config.threading.set_intra_op_parallelism_threads(1)
task = cifar.Cifar()
batches = flags.FLAGS.global_batch_size, flags.FLAGS.per_worker_batch_size
plan = make_plan(task.examples, *batches, 1, 1)
trainer = _make_trainer(task, plan, OneProcess())
trainer.divide(plan)
saved = {f"start-{i}": v.numpy() for i, v in enumerate(trainer.model.variables)}
task.load()
task.data.padding = 0
losses, batches = [], iter(task.training_batches(plan, 0, 0, 0, 0))
for _ in range(20):
    for _ in range(plan.micro_steps):
        trainer.micro_step(*next(batches))
    losses.append(float(trainer.apply(tf.constant(0.0))[0]))
saved.update({f"end-{i}": v.numpy() for i, v in enumerate(trainer.model.variables)})
saved.update({f"average-{i}": v.numpy() for i, v in enumerate(trainer.averages)})
np.savez(sys.argv[1], losses=losses, **saved)
"""
# Each case is a fork of one process, which has imported everything.
JAX = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "jax"
import jax
import numpy as np
from scripts.fullsize.data import ImageFiles
from scripts.fullsize.runs import full_flags
from scripts.fullsize.training import Training

for case, (flags, seeds) in json.loads(sys.argv[3]).items():
    if not os.fork():
        break
    if os.wait()[1]:
        sys.exit(f"{case} failed")
else:
    sys.exit()
given = np.load(f"{sys.argv[1]}/{case}.npz")
flags = full_flags("run", flags)
training = Training(flags, seeds, ImageFiles(sys.argv[2], "digits"), augment=False)
training.compile(loops_in_python=len(seeds) == 1)
model = training.models[0]
for i, variable in enumerate(model.variables):
    variable.assign(given[f"start-{i}"])
state, logs = training.train_epoch(training.initial_state(), 0)
if len(seeds) > 1:
    state = jax.tree.map(lambda x: x[0], state)
for variable, value in zip(model.trainable_variables, state["weights"]):
    variable.assign(value)
for variable, value in zip(model.non_trainable_variables, state["statistics"]):
    variable.assign(value)
worst = 0.0
found = {f"end-{i}": np.asarray(v) for i, v in enumerate(model.variables)}
found.update({f"average-{i}": v for i, v in enumerate(state["averages"])})
for name, value in found.items():
    difference = np.linalg.norm(value - given[name])
    worst = max(worst, difference / (np.linalg.norm(given[name]) + 1e-3))
print(case, worst, np.max(np.abs(logs[0]["loss"] / given["losses"] - 1)), flush=True)
"""


def started(*words):
    return subprocess.run(
        [*map(str, words)],
        cwd=ROOT,
        env={**environment(), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def python(*words):
    return started(sys.executable, *words)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Digits, and two runs: one alone, and one that takes the best factor of those before."""
    folder = tmp_path_factory.mktemp("data")
    definition = {
        "flags": {**FLAGS, "epochs": 2, "global_batch_size": 64, "training_examples": 128},
        "optimizers": {"NLCG": {"optimizer": "nlcg"}},
        "grid": [
            {"learning_rate_factor": 2, "seed": 0},
            {"learning_rate_factor": "best", "seed": 1},
        ],
    }
    (folder / "runs.yaml").write_text(yaml.safe_dump(definition))
    export = ["--dataset=digits", f"--config={folder / 'runs.yaml'}"]
    result = python("-m", "scripts.fullsize", f"--export={folder}", *export)
    assert result.returncode == 0, result.stderr
    assert all(os.path.getsize(file) <= 45_000_000 for file in folder.iterdir())
    return folder


# Flags, seeds, and how far the losses may be apart.
SMALL = {"per_worker_batch_size": 8, "global_batch_size": 16, "training_examples": 320}
LARGE = {"per_worker_batch_size": 32, "global_batch_size": 64, "training_examples": 1280}
CASES = {
    # Beside another seed, in the compiled loops that GPUs have, and CPUs take long for.
    "blended": (
        {**SMALL, "update_rule": "blended", "preconditioner": "normalized_bfgs"},
        [0, 1],
        1e-4,
    ),
    "published": (
        {
            **LARGE,
            "update_rule": "fletcher_reeves",
            "preconditioner": "bfgs",
            "line_search": "online",
        },
        [0],
        1e-4,
    ),
    # Polar factors multiply rounding by the gradients' condition, the more the longer the steps.
    "default": ({**LARGE, "peak_learning_rate": 0.004}, [0], 1e-5),
}


def test_20_updates_equal_those_of_the_tensorflow_trainer(data, tmp_path):
    flags = {name: {**FLAGS, "epochs": 1, **own} for name, (own, *_) in CASES.items()}
    for name, own in flags.items():
        words = ["--optimizer=nlcg", *(f"--{key}={value}" for key, value in own.items())]
        result = run([*PYTHON, "-c", TENSORFLOW, tmp_path / f"{name}.npz", json.dumps(words)])
        assert result.returncode == 0, result.stderr[-3000:]
    cases = {name: (flags[name], seeds) for name, (_, seeds, _) in CASES.items()}
    result = python("-c", JAX, tmp_path, data, json.dumps(cases))
    assert result.returncode == 0, result.stderr[-3000:]
    found = {}
    for line in result.stdout.splitlines():
        name, *figures = line.split()
        if name in CASES:
            found[name] = [float(figure) for figure in figures]
    assert found.keys() == CASES.keys()
    for name, (weights, losses) in found.items():
        bound = CASES[name][2]
        assert weights < 3 * bound and losses < bound, name


def test_a_study_goes_on_where_it_was_stopped(data, tmp_path):
    command = ["-m", "scripts.fullsize", f"--data={data}", f"--config={data / 'runs.json'}"]
    folder = tmp_path / "study"
    assert python(*command, f"--folder={folder}", "--minutes=1e-6").returncode == 75
    # As if the kernels had been checked by an earlier call, on another machine.
    (tmp_path / "kernels.txt").write_text("exit status 0")
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as archive:
        for path in (tmp_path / "kernels.txt", folder):
            archive.add(path, path.name)
    shutil.rmtree(folder)
    (tmp_path / "kernels.txt").unlink()
    result = started(ROOT / "scripts" / "on_gpu.sh", data, tmp_path, "--minutes=9")
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        sent = {pathlib.PurePath(name).name for name in archive.getnames()}
    assert {"summary.json", "metrics.jsonl", "kernels.txt"} <= sent and "state.npz" not in sent
    first, second = (folder / "runs" / f"NLCG-64-e2-f{f}" for f in ("2-s0", "best-s1"))
    for place in (first, second):
        records = read_metrics(place)
        assert [r["update"] for r in records if r["type"] == "step"] == [1, 2, 3, 4]
        assert [r["epoch"] for r in records if r["type"] == "epoch"] == [1, 2]
        assert "gain_ratio" in records[-1] and read_json(place / "summary.json")["updates"] == 4
    assert read_flags(second)["learning_rate_factor"] == 2
    result = python(*command, f"--folder={folder}", "--precision=bfloat16")
    assert result.returncode == 2 and "--precision=float32, not bfloat16" in result.stderr
    # The first run again, by itself, without an interruption.
    runs = json.loads((data / "runs.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps({first.name: runs[first.name]}))
    whole = tmp_path / "whole"
    shutil.copytree(folder / ".compiled", whole / ".compiled")
    command[-1] = f"--config={tmp_path / 'one.json'}"
    assert python(*command, f"--folder={whole}").returncode == 0
    same = [
        [r["loss"] for r in read_metrics(place) if r["type"] == "step"]
        for place in (first, whole / "runs" / first.name)
    ]
    np.testing.assert_array_equal(*same)


def test_what_cannot_be_run_is_an_error(tmp_path):
    definition = {"flags": FLAGS, "optimizers": {"A": {"optimizer": "adam", "compression": "fp16"}}}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(definition))
    command = ["-m", "scripts.fullsize", f"--config={tmp_path / 'runs.yaml'}"]
    result = python(*command, f"--data={tmp_path}", f"--folder={tmp_path / 'a'}")
    assert result.returncode == 2 and "--compression=fp16 is not for one device" in result.stderr
