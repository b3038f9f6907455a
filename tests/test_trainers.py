"""The parts of the trainers, and the CIFAR trainer's flags and resuming as a user meets them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from distributed.launch import ROOT, TRAINER, records, run, run_each

from scripts import kill_test
from trainers import data, models, preemption
from trainers.checkpoints import Checkpoints
from trainers.lars import LARS
from trainers.momentum import Momentum
from trainers.optimizers import NAMES, make_optimizer
from trainers.plan import divide, make_plan

CIFAR100 = ROOT.parent / "shared" / "data" / "tensorflow_datasets"


@pytest.mark.parametrize("depth, parameters", [(20, 269722), (32, 464154), (56, 853018)])
def test_resnet_has_the_published_number_of_parameters(depth, parameters):
    """He et al. 2016, table 6: 0.27 M, 0.46 M and 0.85 M for CIFAR-10."""
    model = models.cifar_resnet(depth, (32, 32, 3), 10)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters


def test_resnet32_has_95_tensors_and_regularizes_kernels_alone():
    model = models.cifar_resnet(32, (32, 32, 3), 100, weight_decay=1e-4)
    assert len(model.trainable_variables) == 95
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    expected = 1e-4 * sum(float(tf.reduce_sum(tf.square(v))) for v in kernels)
    assert float(tf.add_n(model.losses)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="depth=9"):
        models.cifar_resnet(9, (32, 32, 3), 100)


def test_rmsprop_and_nesterov_have_the_papers_settings():
    rmsprop = make_optimizer("rmsprop", 0.1)
    assert (rmsprop.rho, rmsprop.momentum, rmsprop.epsilon) == (0.9, 0.9, 1.0)
    nesterov = make_optimizer("nesterov", 0.1)
    assert (nesterov.momentum, nesterov.nesterov) == (0.9, True)
    for name in NAMES:
        assert isinstance(make_optimizer(name, 0.1), keras.optimizers.Optimizer)
    with pytest.raises(ValueError, match="name='lion'"):
        make_optimizer("lion", 0.1)


@pytest.mark.parametrize("l2", [0.0, 1e-3])
def test_lars_follows_its_paper(l2):
    """Against its Algorithm 1 in float64 NumPy, with a kernel and a gradient that are zero once."""
    generator = np.random.default_rng(0)
    shapes = [(3, 3, 4, 8), (8,), (8, 5), (5, 2)]
    w = [generator.normal(size=shape) for shape in shapes]
    w[3][:] = 0
    variables = [keras.Variable(x, dtype="float32") for x in w]
    optimizer = LARS(0.5, momentum=0.8, trust_coefficient=0.02, l2=l2)
    v = [np.zeros(shape) for shape in shapes]
    for step in range(20):
        g = [generator.normal(size=shape) for shape in shapes]
        g[2] *= step != 5
        optimizer.apply([tf.constant(x, tf.float32) for x in g], variables)
        for i, (x, y) in enumerate(zip(w, g)):
            rate = 1.0
            norm, gradient_norm = np.sqrt((x**2).sum()), np.sqrt((y**2).sum())
            if x.ndim > 1:
                if norm > 0 and gradient_norm > 0:
                    rate = 0.02 * norm / (gradient_norm + l2 * norm)
                y = y + l2 * x
            v[i] = 0.8 * v[i] + 0.5 * rate * y
            w[i] = x - v[i]
    for variable, x in zip(variables, w):
        np.testing.assert_allclose(variable.numpy(), x, rtol=1e-4, atol=1e-5)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    with pytest.raises(ValueError, match="momentum=1"):
        LARS(momentum=1)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_has_the_rate_outside_of_its_velocity(nesterov):
    """Against float64 NumPy under a falling rate, where Keras' form differs."""
    generator = np.random.default_rng(0)
    w, v = generator.normal(size=(4, 3)), 0.0
    variable = keras.Variable(w, dtype="float32")
    optimizer = Momentum(learning_rate=1.0, momentum=0.8, nesterov=nesterov)
    for rate in (0.5, 0.5, 0.05, 0.05):
        g = generator.normal(size=w.shape)
        optimizer.learning_rate = rate
        optimizer.apply([tf.constant(g, tf.float32)], [variable])
        v = 0.8 * v + g
        w = w - rate * (g + 0.8 * v if nesterov else v)
    np.testing.assert_allclose(variable.numpy(), w, rtol=1e-5, atol=1e-6)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    with pytest.raises(ValueError, match=r"momentum=-0\.1"):
        Momentum(momentum=-0.1)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def epoch(digits, workers, per_worker, seed=1, number=0, first=0):
    """All workers' micro-batches of an epoch: [update, position in the virtual batch]."""
    plan = make_plan(1437, 256, per_worker, workers, 1)
    parts = []
    for rank in range(workers):
        batches = list(data.training_batches(digits, plan, rank, seed, number, first))
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        updates = plan.updates_per_epoch - first
        parts.append((images.reshape(updates, -1, 8, 8, 1), labels.reshape(updates, -1)))
    return tuple(np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))


@pytest.mark.parametrize("workers, per_worker", [(1, 64), (2, 128), (2, 32), (4, 16)])
def test_a_virtual_batch_holds_the_same_augmented_images(digits, workers, per_worker):
    images, labels = epoch(digits, 1, 256)
    other_images, other_labels = epoch(digits, workers, per_worker)
    np.testing.assert_array_equal(images, other_images)
    np.testing.assert_array_equal(labels, other_labels)
    assert images.shape == (5, 256, 8, 8, 1)


def test_epochs_and_seeds_differ_and_a_resumed_epoch_does_not(digits):
    images, labels = epoch(digits, 2, 64)
    assert (labels != epoch(digits, 2, 64, number=1)[1]).any()
    assert (labels != epoch(digits, 2, 64, seed=2)[1]).any()
    np.testing.assert_array_equal(images[3:], epoch(digits, 2, 64, first=3)[0])


def test_augmented_images_are_shifted_originals(digits):
    """Each training image, before standardisation, is one of the 9 crops of its padded original."""
    pixels = digits.train[0][:200].astype(np.float32)
    generator = np.random.default_rng(0)
    draws = generator.integers(0, 3, size=(200, 3))
    draws[:, 2] = 0
    crops = data._augment(tf.constant(pixels), tf.constant(draws, tf.int32), 1).numpy()
    padded = np.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for crop, image, (top, left, _) in zip(crops, padded, draws):
        np.testing.assert_array_equal(crop, image[top : top + 8, left : left + 8])
    draws[:, 2] = 1
    mirrored = data._augment(tf.constant(pixels), tf.constant(draws, tf.int32), 1).numpy()
    np.testing.assert_array_equal(mirrored, crops[:, :, ::-1])


def test_an_epoch_sees_every_image_once_and_a_huge_batch_wraps_around():
    order = data.epoch_indices(100, 100, 0, 0)
    assert sorted(order) == list(range(100))
    wrapped = data.epoch_indices(100, 250, 0, 0)
    counts = np.bincount(wrapped, minlength=100)
    assert counts.min() == 2 and counts.max() == 3


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_test_image_counts_once(digits, workers):
    parts = [list(data.test_batches(digits, 50, rank, workers)) for rank in range(workers)]
    assert len({len(part) for part in parts}) == 1
    labels = np.concatenate([y[w > 0] for part in parts for _, y, w in part])
    assert sorted(labels) == sorted(digits.test[1])


def test_digits_are_split_once_and_for_all(digits):
    assert (len(digits.train[1]), len(digits.test[1])) == (1437, 360)
    seen = {image.tobytes() for image in digits.train[0]}
    assert not any(image.tobytes() in seen for image in digits.test[0])


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not there")
def test_cifar100_is_loaded_whole():
    cifar = data.load("cifar100", str(CIFAR100))
    assert cifar.train[0].shape == (50000, 32, 32, 3) and cifar.test[0].shape == (10000, 32, 32, 3)
    means = cifar.train[0].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.50708, 0.48655, 0.44092], atol=1e-4)


@pytest.mark.skipif(not CIFAR100.exists(), reason="no CIFAR-100 here")
def test_a_damaged_or_missing_file_is_named(tmp_path):
    folder = tmp_path / "cifar100" / "3.0.2"
    folder.mkdir(parents=True)
    for file in (CIFAR100 / "cifar100" / "3.0.2").iterdir():
        if ".tfrecord" not in file.name:
            (folder / file.name).symlink_to(file)
        elif "test" in file.name:
            with file.open("rb") as whole:
                (folder / file.name).write_bytes(whole.read(100_000))
    words = r"cifar100-train.tfrecord-00000-of-00001: .*No such file.*"
    with pytest.raises(OSError, match=words + "cifar100-test.*: truncated record at"):
        data.load("cifar100", str(tmp_path))


def test_every_flagfile_passes_a_dry_run():
    """In one process: each start of TensorFlow would take longer than all of them."""
    code = """
import functools, pathlib
from absl import flags
from trainers import cifar, models, run
models.cifar_resnet = functools.cache(models.cifar_resnet)  # the same model for all
for path in sorted(pathlib.Path("configs/cifar100").glob("*.cfg")):
    flags.FLAGS.unparse_flags()
    flags.FLAGS(["x", f"--flagfile={path}", "--dry_run"])
    print(f"== {path.stem}")
    run.run(cifar.Cifar())
"""
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr[-4000:]
    parts = dict(part.split("\n", 1) for part in result.stdout.split("== ")[1:])
    assert len(parts) == 55
    largest = parts["nlcg_fr-16384-500"]
    assert "batch 16,384 = 1 worker(s) x 16 micro-step(s) x 1,024; 1,500 updates" in largest
    assert "warm-up to 12.8 takes 25 epochs" in largest


def test_elastic_workers_divide_the_same_batch():
    assert [divide(96, 16, workers) for workers in (1, 2, 3, 4, 12)] == [16, 16, 16, 12, 8]
    with pytest.raises(ValueError, match="--global_batch_size=96 cannot be divided among 5"):
        divide(96, 16, 5)


def test_checkpoints_are_whole_and_the_newest_whole_one_is_taken(tmp_path):
    a, b = tf.Variable([1.0, 2.0]), tf.Variable(3.0)
    saved = Checkpoints(tmp_path, keep=2, a=a, b=b)
    assert saved.newest(print) == (None, {})
    for update in (1, 2, 3):
        b.assign(update)
        saved.save(update, 0, {"record": {"epoch": update}})
    names = ["update-00000002-epoch-0000", "update-00000003-epoch-0000"]
    assert [path.name for path in saved.all()] == names
    path, meta = saved.newest(print)
    assert path.name == names[1] and meta["update"] == 3 and meta["record"] == {"epoch": 3}
    a.assign([0.0, 0.0])
    saved.restore(path)
    np.testing.assert_array_equal(a.numpy(), [1.0, 2.0])
    for others in ({"a": a}, {"a": a, "b": b, "c": tf.Variable(0.0)}, {"a": tf.Variable([1.0])}):
        with pytest.raises(ValueError, match="does not fit this run"):
            Checkpoints(tmp_path, **others).restore(path)
    # What a killed process left is swept away by the next save; what a user made stays.
    (tmp_path / "partial-00000009-epoch-0000").mkdir()
    of_users = [tmp_path / "update-best", tmp_path / "partial-best"]
    for copy in of_users:
        shutil.copytree(path, copy)
    assert saved.newest(print)[0] == path
    saved.save(3, 1, {})
    assert [path.name[-4:] for path in saved.all()] == ["0000", "0001"]
    assert not list(tmp_path.glob("partial-0*")) and all(copy.is_dir() for copy in of_users)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(tmp_path):
    """A read error may pass; going on from an older checkpoint would end with its removal."""
    saved = Checkpoints(tmp_path, a=tf.Variable(1.0))
    for update in (1, 2):
        saved.save(update, 0, {})
    meta = saved.all()[-1] / "meta.json"
    meta.unlink()
    meta.symlink_to(meta)
    with pytest.raises(OSError, match=r"meta\.json"):
        saved.newest(print)


@pytest.mark.parametrize(
    "how", ["cut", "changed", "gone", "meta cut", "meta gone", "meta changed", "no list"]
)
def test_a_damaged_checkpoint_is_passed_over(how, tmp_path):
    a = tf.Variable(np.arange(1000.0))
    saved = Checkpoints(tmp_path, keep=3, a=a)
    for update in (1, 2):
        a.assign_add(tf.ones(1000, a.dtype))
        saved.save(update, 0, {})
    newest = saved.all()[-1]
    data, meta = next(newest.glob("state.data*")), newest / "meta.json"
    file = meta if "meta" in how else data
    content = bytearray(file.read_bytes())
    if how.endswith("cut"):
        file.write_bytes(content[: len(content) // 2])
    elif how.endswith("gone"):
        file.unlink()
    elif how == "changed":
        content[500] ^= 1
        file.write_bytes(content)
    elif how == "meta changed":
        meta.write_text(meta.read_text().replace("update", "updaet"))
    else:
        meta.write_text("[]")
    warnings = []
    path, _ = saved.newest(warnings.append)
    assert path.name == "update-00000001-epoch-0000"
    assert len(warnings) == 1 and str(newest) in warnings[0] and "damaged" in warnings[0]
    # Training comes to the same update again, and saves it again; or to one before a damaged one.
    saved.save(2, 0, {})
    assert saved.newest(print)[0] == newest
    saved.save(9, 0, {})
    next(saved.all()[-1].glob("state.data*")).unlink()
    fewer = Checkpoints(tmp_path, keep=1, a=a)
    fewer.save(6, 0, {})
    assert [path.name for path in fewer.all()] == ["update-00000006-epoch-0000"]
    for path in saved.all():
        (path / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"all checkpoints under .* are damaged"):
        saved.newest(warnings.append)


def test_a_wrong_flag_gets_one_clear_line(tmp_path):
    cases = {
        "--global_batch_size=100 is no": ["--global_batch_size=100", "--per_worker_batch_size=64"],
        "depth=10": ["--depth=10"],
        "--training_examples=1438 is more than the 1437": ["--training_examples=1438"],
        "--dataset=digits comes with": ["--dataset=digits", "--data_dir=x"],
        "cifar100 is not prepared": ["--dataset=cifar100", "--data_dir=/nowhere"],
        "/dev/null/run": ["--output_dir=/dev/null/run"],
        "flag --checkpoint_steps=0": ["--checkpoint_steps=0"],
        "flag --epochs=0": ["--epochs=0"],
        "--optimizer=lion": ["--optimizer=lion"],
        "colour": ["--colour=red"],
        "unknown arguments: digits": ["digits"],
    }
    run_folder = f"--output_dir={tmp_path / 'run'}"
    commands = [["--depth=8", run_folder, *flags] for flags in cases.values()]
    for message, result in zip(cases, run_each("trainers.cifar", commands, tmp_path)):
        assert result.returncode in (1, 2), result
        assert message in result.stdout and "Traceback" not in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


def test_the_users_keras_settings_do_not_matter(tmp_path):
    """Nor do --jit_compile and --deterministic together, as XLA has it for the CIFAR network."""
    (tmp_path / "keras.json").write_text(
        '{"backend": "tensorflow", "image_data_format": "channels_first", "floatx": "float64"}'
    )
    flags = ["--epochs=1", "--global_batch_size=479", "--jit_compile", "--deterministic"]
    command = [*TRAINER, *flags, f"--output_dir={tmp_path / 'run'}"]
    result = run(command, KERAS_HOME=str(tmp_path))
    assert result.returncode == 0 and "after 3 updates" in result.stdout, result.stderr
    result = run(command, KERAS_BACKEND="jax")
    assert result.returncode == 1 and "need KERAS_BACKEND=tensorflow" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_command_goes_on(tmp_path):
    """After SIGTERM, which saves; but not with other flags, and not beyond the end."""
    folder = tmp_path / "run"
    flags = ["--global_batch_size=256", "--epochs=20", "--deterministic", "--log_steps=1"]
    command = [*TRAINER, *flags, f"--output_dir={folder}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/20"):
            break
    process.send_signal(signal.SIGSTOP)  # so that it does not end meanwhile
    meanwhile = run(command)
    process.send_signal(signal.SIGCONT)
    assert meanwhile.returncode == 2 and "another run is using --output_dir" in meanwhile.stderr
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM, state saved" in process.communicate()[0]
    assert process.returncode == preemption.EXIT_STATUS
    stopped_at = int(sorted((folder / "checkpoints").glob("update-*"))[-1].name[7:15])
    assert 10 < stopped_at < 100
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"type": "step", "upd')  # a kill in the middle of a line

    other = run([*command, "--seed=5"])
    assert other.returncode == 2 and "--seed was 0, is 5" in other.stderr
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert f"epochs, {stopped_at} done" in resumed.stdout
    assert [record["epoch"] for record in records(folder, "epoch")] == list(range(1, 21))
    updates = [record["update"] for record in records(folder, "step")]
    assert updates == sorted(set(updates))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == 100
    # The same bits as without the interruption.
    assert run([*TRAINER, *flags, f"--output_dir={tmp_path / 'undisturbed'}"]).returncode == 0
    kill_test.compare(tmp_path / "undisturbed", folder)
    finished = run(command)
    assert finished.returncode == 0, finished.stderr
    assert json.loads((folder / "summary.json").read_text()) == summary  # its times too
    described = json.loads((folder / "flags.json").read_text())
    assert described["flags"]["epochs"] == 20 and described["versions"]["tensorflow"]
    for name in ("curves.png", "checkpoints", "tensorboard"):
        assert os.path.getsize(folder / name) > 0
