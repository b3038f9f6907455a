"""The CIFAR trainer as a user starts it."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

from tests.support.launch import PYTHON, ROOT, TRAINER, records, run
from tests.trainers import kill_test
from trainers.engine import preemption

STARTED = [sys.executable, "-m", "trainers.cifar", "--depth=8"]  # a process of its own


def test_flagfiles_pass_a_dry_run():
    code = """
import functools, pathlib
from absl import flags
from trainers import cifar
from trainers.engine import run
from trainers.models import cifar_resnet
cifar_resnet.cifar_resnet = functools.cache(cifar_resnet.cifar_resnet)  # the same for all
for path in sorted(pathlib.Path("configs/cifar100").glob("*.cfg"))[1::5]:
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["x", f"--flagfile={path}", "--dry_run"])
    print(f"== {path.stem}")
    run.run(cifar.Cifar())
"""
    result = run([*PYTHON, "-c", code])
    assert result.returncode == 0, result.stderr[-4000:]
    parts = dict(part.split("\n", 1) for part in result.stdout.split("== ")[1:])
    assert len(parts) == 11
    largest = parts["nlcg_fr-16384-500"]
    assert "batch 16,384 = 1 worker(s) x 16 micro-step(s) x 1,024; 1,500 updates" in largest
    assert "warm-up to 12.8 takes 25 epochs" in largest


def test_a_wrong_flag_gets_one_clear_line(tmp_path):
    cases = {
        "--global_batch_size=100 is no": ["--global_batch_size=100", "--per_worker_batch_size=64"],
        "depth=10": ["--depth=10"],
        "--training_examples=1438 is more than the 1437": ["--training_examples=1438"],
        "--dataset=digits comes with scikit-learn": ["--dataset=digits", "--data_dir=x"],
        "cifar100 is not prepared": ["--dataset=cifar100", "--data_dir=/nowhere"],
        "/dev/null/run": ["--output_dir=/dev/null/run"],
        "gs://bucket/run is an address": ["--output_dir=gs://bucket/run"],
        "flag --checkpoint_steps=0": ["--checkpoint_steps=0"],
        "flag --epochs=0": ["--epochs=0"],
        "--image_size=5 does not divide the 8 pixels": ["--image_size=5"],
        "--peak_learning_rate replaces the rate": [
            "--peak_learning_rate=0.03",
            "--learning_rate_factor=2",
        ],
        "--optimizer=lion": ["--optimizer=lion"],
        "colour": ["--colour=red"],
        "unknown arguments: digits": ["digits"],
    }
    if importlib.util.find_spec("horovod"):
        message = "--shard_optimizer: `lars_coefficient` needs whole variables"
        cases[message] = ["--shard_optimizer", "--lars_coefficient=0.1", "--dry_run", "--workers=2"]
        message = "--shard_optimizer: with loss scaling it sends gradients without"
        cases[message] = ["--shard_optimizer", "--dry_run", "--workers=2"]
        cases[message] += ["--dtype_policy=mixed_float16", "--compression=fp16"]
    for message, flags in cases.items():
        result = run([*TRAINER, f"--output_dir={tmp_path / 'run'}", *flags])
        assert result.returncode in (1, 2), result
        said = result.stdout + result.stderr
        assert message in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_the_users_keras_settings_do_not_matter(tmp_path):
    """Nor do --jit_compile and --deterministic together, as XLA has it for the CIFAR network."""
    (tmp_path / "keras.json").write_text(
        '{"backend": "tensorflow", "image_data_format": "channels_first", "floatx": "float64"}'
    )
    flags = ["--epochs=1", "--global_batch_size=479", "--jit_compile", "--deterministic"]
    command = [*STARTED, *flags, f"--output_dir={tmp_path / 'run'}"]
    result = run(command, KERAS_HOME=str(tmp_path))
    assert result.returncode == 0 and "after 3 updates" in result.stdout, result.stderr
    result = run(command, KERAS_BACKEND="jax")
    assert result.returncode == 1 and "need KERAS_BACKEND=tensorflow" in result.stderr
    assert "Traceback" not in result.stderr


def test_sigterm_counts_before_tensorflow_is_there(tmp_path):
    command = [*STARTED, "--epochs=1", f"--output_dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> 14 & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM, state saved" in process.communicate()[0]
    assert process.returncode == preemption.EXIT_STATUS
    assert (tmp_path / "checkpoints" / "update-00000000-epoch-0000").is_dir()


def test_the_same_command_goes_on(tmp_path):
    """After SIGTERM, which saves; but not with other flags, and not beyond the end."""
    folder = tmp_path / "run"
    flags = ["--global_batch_size=256", "--epochs=8", "--deterministic", "--log_steps=1"]
    flags.append(f"--output_dir={folder}")
    command = [*TRAINER, *flags]
    process = subprocess.Popen([*STARTED, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/8"):
            break
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    meanwhile = run(command)
    process.send_signal(signal.SIGCONT)
    assert meanwhile.returncode == 2 and "another run is using --output_dir" in meanwhile.stderr
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # the first one counts
        process.send_signal(number)
        time.sleep(0.02)
    assert "stopped by SIGTERM, state saved" in process.communicate()[0]
    assert process.returncode == preemption.EXIT_STATUS
    stopped_at = int(sorted((folder / "checkpoints").glob("update-*"))[-1].name[7:15])
    assert 10 < stopped_at < 40
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "upd')  # a kill in the middle of a line

    other = run([*command, "--seed=5"])
    assert other.returncode == 2 and "--seed was 0, is 5" in other.stderr
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert f"epochs, {stopped_at} done" in resumed.stdout
    assert [record["epoch"] for record in records(folder, "epoch")] == list(range(1, 9))
    updates = [record["update"] for record in records(folder, "step")]
    assert updates == sorted(set(updates))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 40
    # The same bits as without the interruption.
    flags[-1] = f"--output_dir={tmp_path / 'undisturbed'}"
    assert run([*TRAINER, *flags]).returncode == 0
    kill_test.compare(tmp_path / "undisturbed", folder)
    finished = run(command)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((folder / "summary.json").read_text()) == summary  # its times too
    described = json.loads((folder / "flags.json").read_text())
    assert described["flags"]["epochs"] == 8 and described["versions"]["tensorflow"]
    assert run([*command, "--log_steps=2"]).returncode == 0
    assert json.loads((folder / "flags.json").read_text()) == described  # of what made the results
    for name in ("curves.png", "checkpoints", "tensorboard"):
        assert os.path.getsize(folder / name) > 0
    shutil.rmtree(folder / "checkpoints")
    anew = run(command)
    assert anew.returncode == 2 and "has the results of a run that has ended" in anew.stderr
    assert len(records(folder, "epoch")) == 8
