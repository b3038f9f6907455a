"""Where photos come from: class folders and TensorFlow Datasets."""

import numpy as np
import pytest

from scripts.bench import input as bench_input
from tests.support.photos import GOOD, IMAGENETTE, SIZE, epoch
from trainers.data import photos, sources
from trainers.engine.plan import make_plan

Image = pytest.importorskip("PIL.Image")


def test_folders_that_lack_something(folder):
    with pytest.raises(ValueError, match="max_corrupt_examples=-1"):
        sources.open_folder(folder, SIZE, -1)
    (folder / "validation" / "class7").mkdir()
    with pytest.raises(ValueError, match="validation/class7 holds no images"):
        sources.open_folder(folder, SIZE)
    (folder / "validation" / "class7" / "a.jpg").write_bytes(GOOD)
    with pytest.raises(ValueError, match="differ: class7"):
        sources.open_folder(folder, SIZE)
    (folder / "validation").rename(folder / "other")
    with pytest.raises(FileNotFoundError, match="no folder validation or val"):
        sources.open_folder(folder, SIZE)
    (folder / "other" / "train").mkdir()
    (folder / "other" / "val").mkdir()
    with pytest.raises(ValueError, match="other/train holds no class folders"):
        sources.open_folder(folder / "other", SIZE)
    with pytest.raises(FileNotFoundError, match=r"missing holds no folder train"):
        sources.open_folder(folder / "missing", SIZE)


@pytest.fixture
def prepared(folder, tmp_path_factory):
    """The photos of `folder` as TensorFlow Datasets writes them, as `imagenet2012`."""
    tfds = pytest.importorskip("tensorflow_datasets")
    if IMAGENETTE.is_dir():
        for part in ("train", "validation"):
            for i, path in enumerate(sorted((IMAGENETTE / part).glob("*/*"))[:40:2]):
                target = folder / part / f"class{i % 2}" / path.name
                target.write_bytes(path.read_bytes())
    splits = {
        part: [
            (path.name, {"image": str(path), "label": path.parent.name, "file_name": path.name})
            for path in sorted((folder / part).glob("*/*"))
        ]
        for part in ("train", "validation")
    }
    data_dir = tmp_path_factory.mktemp("tfds")
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=["class0", "class1"]),
        "file_name": tfds.features.Text(),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        "imagenet2012", "5.1.0", tfds.features.FeaturesDict(features), splits, data_dir=data_dir
    )
    return data_dir


def test_tensorflow_datasets_gives_the_images_of_the_folder(prepared, folder):
    data, expected = (
        sources.open_tfds(prepared, SIZE),
        sources.open_folder(folder, SIZE),
    )
    assert (data.examples, data.classes) == (expected.examples, 2)

    def test_images(opened):
        ((pixels, labels, weights),) = opened.test_batches(opened.test_examples, 0, 1)
        assert weights.numpy().all()
        by_image = sorted(zip(pixels.numpy().tolist(), labels.numpy().tolist()))
        return [np.array(column) for column in zip(*by_image)]

    for a, b in zip(test_images(data), test_images(expected)):
        np.testing.assert_array_equal(a, b)
    whole = epoch(data, 1, 10)
    for divided in (epoch(data, 2, 5), epoch(data, 1, 5)):
        for a, b in zip(divided, whole):
            np.testing.assert_array_equal(a, b)


def test_damage_in_tensorflow_datasets_is_named(prepared):
    (file,) = prepared.glob("imagenet2012/5.1.0/*train*")
    content = file.read_bytes()
    at = content.index(b"\xff\xd8\xff")
    file.write_bytes(content[:at] + b"xxx" + content[at + 3 :])
    data = sources.open_tfds(prepared, SIZE)
    plan = make_plan(data.examples, data.examples, data.examples, 1, 1)
    with pytest.raises(ValueError, match=r"damaged image \S+\.JPEG \(at byte \d+ of .*train"):
        list(data.training_batches(plan, 0, 0, 0, 0))
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="ends within record"):
        sources.open_tfds(prepared, SIZE)


def test_tensorflow_datasets_that_are_not_there(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match=r"tfds build imagenet2012"):
        sources.open_tfds(tmp_path, SIZE)


def test_synthetic_images_have_the_same_form():
    data = photos.Synthetic(SIZE, classes=7, examples=100)
    pixels, labels = epoch(data, 2, 5, first=3, examples=data.examples, batch=20)
    assert pixels.shape == (2, 20, SIZE, SIZE, 3) and labels.max() < 7
    ((pixels, labels, weights),) = data.test_batches(4, 1, 2)
    assert pixels.shape == (4, SIZE, SIZE, 3) and weights.numpy().tolist() == [1] * 4


def test_the_benchmark_runs(tmp_path, capsys):
    bench_input.write_photos(tmp_path, count=12, copies=2, classes=2)
    result = bench_input.bench(tmp_path, size=16, batch=4, seconds=0.05, repeats=1)
    assert set(result["speed_ratios"]) == {"keras", "keras_fixed_crop"}
    assert "images/s" in capsys.readouterr().out
