"""The ImageNet trainer: its models, its flagfiles, and a run on real photos."""

import json
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from configs import generate
from tests.support.launch import DATA, PYTHON, ROOT, records, run
from trainers.models.resnet50 import resnet50

TRAINER = [*PYTHON, "-m", "trainers.imagenet"]
PHOTOS = DATA / "imagenette"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photos are not there")
ORIGINALS = {"v1": keras.applications.ResNet50, "v2": keras.applications.ResNet50V2}


@pytest.mark.parametrize("version", ORIGINALS)
def test_resnet50_is_that_of_keras_applications(version):
    original = ORIGINALS[version](
        weights=None, input_shape=(64, 64, 3), classes=10, classifier_activation=None
    )
    model = resnet50(version, 64, 10, weight_decay=0.5)
    assert model.count_params() == original.count_params()
    rng = np.random.default_rng(0)
    # Batch norm's statistics too, so that another order of weights would show.
    weights = [np.abs(w + 0.1 * rng.normal(size=w.shape)) for w in original.get_weights()]
    for each in (original, model):
        each.set_weights(weights)
    images = rng.normal(size=(2, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(model(images), original(images), rtol=2e-4)
    # L2 on the kernels of all convolutions and of the classifier, and on nothing else.
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]
    expected = 0.5 * sum(float(tf.reduce_sum(tf.square(v))) for v in kernels)
    np.testing.assert_allclose(float(tf.add_n(model.losses)), expected, rtol=1e-5)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)


def test_bad_arguments_of_resnet50():
    with pytest.raises(ValueError, match="version='v3'"):
        resnet50("v3", 64, 10)
    with pytest.raises(ValueError, match="image_size=31"):
        resnet50("v1", 31, 10)


def test_the_flagfiles_are_those_of_the_generator(tmp_path):
    def texts(folder):
        return {str(p.relative_to(folder)): p.read_text() for p in folder.glob("*/*.cfg")}

    own = {"imagenet/mine.cfg": "--epochs=1"}
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "mine.cfg").write_text("--epochs=1")
    (tmp_path / "imagenet" / "nlcg-1-1.cfg").write_text(generate.MARK)
    generate.write(tmp_path)
    assert texts(tmp_path) == own | texts(pathlib.Path(ROOT, "configs"))
    assert len(generate.configs()) == 52 + 55


def test_flagfiles_pass_a_dry_run():
    code = """
import functools, pathlib
from absl import flags
from trainers import imagenet
from trainers.engine import run
from trainers.models import resnet50
resnet50.resnet50 = functools.cache(resnet50.resnet50)  # the same model for all
for workers in (1, 64):
    for path in sorted(pathlib.Path("configs/imagenet").glob("*.cfg"))[0::4]:
        flags.FLAGS.unparse_flags()
        one = ["--per_worker_batch_size=64"] if workers == 1 else []
        flags.FLAGS(["x", f"--flagfile={path}", *one, "--dry_run", f"--workers={workers}"])
        print(f"== {path.stem} {workers}")
        run.run(imagenet.ImageNet())
"""
    result = run([*PYTHON, "-c", code])
    assert result.returncode == 0, result.stderr[-4000:]
    parts = result.stdout.split("== ")[1:]
    assert len(parts) == 2 * 13
    for part in parts:
        assert part.count("\n") == 6 and "learning rate at" in part and "GiB" in part
    largest = next(part for part in parts if part.startswith("nlcg_fr-98304-270 64"))
    assert "batch 98,304 = 64 worker(s) x 24 micro-step(s) x 64; 3,510 updates" in largest
    assert "25,583,592 parameters, 1,281,167 training images" in largest
    assert "an epoch: 13 updates, 312 micro-steps" in largest
    assert "warm-up to 38.4 takes 30 epochs" in largest and "last update: 0.01" in largest


def test_a_wrong_flag_gets_one_clear_line(tmp_path):
    cases = [
        (["--dataset=folder"], "error: --dataset=folder needs --data_dir"),
        (["--dataset=synthetic", "--data_dir=x"], "error: --dataset=synthetic takes no --data_dir"),
        (["--dataset=folder", "--data_dir=/nowhere"], "/nowhere"),
        (["--data_dir=/nowhere"], "/nowhere"),
        (["--dataset=synthetic", "--image_size=16"], "error: --image_size=16"),
        (["--dataset=synthetic", "--workers=2"], "error: --workers is for --dry_run"),
    ]
    for flags, message in cases:
        start = [sys.executable, "-m", "trainers.imagenet"] if flags is cases[0][0] else TRAINER
        result = run([*start, f"--output_dir={tmp_path / 'run'}", *flags])
        assert result.returncode == 2, result
        lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and message in lines[0], result.stderr
    assert not (tmp_path / "run").exists()


@needs_photos
def test_photos_are_trained_on_evaluated_and_exported(tmp_path):
    """A saved run evaluates as it did in training, and its export loads without this package."""
    for part, count in (("train", 24), ("validation", 8)):
        for folder in sorted((PHOTOS / part).iterdir())[:2]:
            target = tmp_path / "data" / part / folder.name
            target.mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:count]:
                (target / photo.name).symlink_to(photo)
    flags = ["--dataset=folder", f"--data_dir={tmp_path / 'data'}", "--image_size=32"]
    flags += ["--model=v2", "--global_batch_size=24", "--per_worker_batch_size=12", "--epochs=2"]
    flags += ["--label_smoothing=0.1", "--evaluation_epochs=2"]
    flags += ["--max_corrupt_examples=1"]
    folder = tmp_path / "run"
    photo = next((tmp_path / "data" / "train").glob("*/*.JPEG"))
    whole = photo.resolve()
    photo.unlink()
    photo.write_bytes(b"x" * whole.stat().st_size)
    result = run([*TRAINER, *flags, f"--output_dir={folder}"])
    assert result.returncode == 0, result.stderr[-4000:]
    # Resumed after its first epoch, with the photo mended: that one was skipped is still known.
    photo.write_bytes(whole.read_bytes())
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    result = run([*TRAINER, *flags, f"--output_dir={folder}"])
    assert result.returncode == 0 and "resuming" in result.stdout, result.stderr[-4000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["updates"], summary["micro_steps"]) == (4, 2)
    assert summary["skipped_images"] == 1
    assert ["top1" in record for record in records(folder, "epoch")] == [False, True]
    evaluate = [sys.executable, "-m", "trainers.evaluate", f"--checkpoint={folder}"]
    shown = run([*evaluate, "--max_corrupt_examples=2"]).stdout  # a flag of the run's trainer
    assert f"top-1 {summary['top1']:.2%}  top-5 {summary['top5']:.2%}" in shown
    # With other photos the run must not go on: labels and order would be others.
    next((tmp_path / "data" / "train").glob("*/*.JPEG")).unlink()
    changed = run([*TRAINER, *flags, f"--output_dir={folder}"])
    assert changed.returncode == 2 and "--data_dir's files was" in changed.stderr
    shutil.rmtree(tmp_path / "data")  # an export needs no photos
    exported = tmp_path / "model.keras"
    assert run([*evaluate, f"--export={exported}"]).returncode == 0
    code = f"""
import sys, keras, numpy as np
model = keras.models.load_model({str(exported)!r})
assert model(np.zeros((1, 32, 32, 3), "float32")).shape == (1, 2)
assert not any(name.startswith(("nlcg_tf", "trainers")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
