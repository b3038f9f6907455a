"""The pipelines of photos: right pixels, a fixed order, and damaged files."""

import io
import itertools

import numpy as np
import pytest
import tensorflow as tf
from distributed.launch import ROOT

from scripts import bench_input
from trainers import imagenet_data, images
from trainers.plan import make_plan

Image = pytest.importorskip("PIL.Image")

SIZE = 32
IMAGENETTE = ROOT.parent / "shared" / "data" / "imagenette"
ORIGINALS = ROOT.parent / "shared" / "data" / "imagenet_originals"
# A value of 255 after normalisation is a step of 1 / (255 * 0.225); float32 rounds some 1e-6.
TOLERANCE = 2e-5


def photo(rng, height, width, channels=3):
    """A smooth random field with some noise, uint8."""
    coarse = tf.image.resize(rng.normal(size=(5, 6, channels)), (height, width), "bicubic")
    pixels = 128 + 60 * coarse.numpy() + 6 * rng.normal(size=(height, width, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(pixels, kind="JPEG", mode=None, **options):
    stream = io.BytesIO()
    picture = Image.fromarray(pixels.squeeze())
    (picture.convert(mode) if mode else picture).save(stream, kind, **options)
    return stream.getvalue()


def write(folder, files, part="train"):
    """Files in two classes; files: dict of names to bytes."""
    for i, (name, content) in enumerate(files.items()):
        path = folder / part / f"class{i % 2}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def folder(tmp_path, rng):
    """21 training and 7 test photos of two classes, each with a colour of its own."""
    for part, count in (("train", 21), ("validation", 7)):
        sizes = rng.integers(20, 90, (count, 2))
        files = {f"{i:02}.JPEG": encoded(photo(rng, *size)) for i, size in enumerate(sizes)}
        write(tmp_path, files, part)
    return tmp_path


def reference(data, top, left, height, width, size):
    """Crop, bilinear resize with half-pixel centres and normalisation in float64."""
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)
    pixels = pixels[top : top + height, left : left + width]
    for axis, length in ((0, height), (1, width)):
        centres = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(centres).astype(int)
        share = (centres - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, length - 1)
        pixels = pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share
    return (pixels / 255 - images.MEAN) / images.DEVIATION


@tf.function
def images_of(data, seeds):
    """A training image as it is and mirrored, and the test image."""
    pair = [images.training_image(data, seeds, tf.constant(m), SIZE) for m in (False, True)]
    return (*pair, images.test_image(data, SIZE))


def check_pixels(data, seed):
    """Training and test image of a file against the reference."""
    seeds = tf.constant([seed, 7], tf.int64)
    height, width = np.asarray(Image.open(io.BytesIO(data))).shape[:2]
    begin, size = images.random_window(tf.constant([height, width, 3]), seeds)
    expected = reference(data, *begin.numpy(), *size.numpy(), SIZE)
    plain, mirrored, test = images_of(tf.constant(data), seeds)
    np.testing.assert_allclose(plain, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    side = round(0.875 * min(height, width))
    expected = reference(data, (height - side) // 2, (width - side) // 2, side, side, SIZE)
    np.testing.assert_allclose(test, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("height, width", [(1, 1), (7, 300), (33, 31), (301, 203)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"progressive": True},
        {"mode": "L"},
        {"kind": "PNG"},
        {"kind": "PNG", "mode": "P"},
    ],
    ids=str,
)
def test_images_agree_with_a_float64_reference(rng, height, width, options):
    data = encoded(photo(rng, height, width), **options)
    for seed in range(4):
        check_pixels(data, seed)


@pytest.mark.parametrize("height, width", [(60, 80), (33, 31)])
def test_cmyk_becomes_rgb(rng, height, width):
    """Neutral tones survive the way through CMYK, and channels keep their order."""
    pixels = photo(rng, height, width)
    data = encoded(pixels, mode="CMYK", quality=100, subsampling=0)
    decoded = images.decode(tf.constant(data), lambda shape: (0 * shape[:2], shape[:2])).numpy()
    np.testing.assert_allclose(decoded, pixels, atol=6)
    window = tf.constant([[3, 5], [20, 11]])
    part = images.decode(tf.constant(data), lambda _: tf.unstack(window)).numpy()
    np.testing.assert_array_equal(part, decoded[3:23, 5:16])


def test_random_windows_have_the_right_areas_and_aspects():
    shape = tf.constant([400, 500, 3])
    sizes = np.array(
        [images.random_window(shape, tf.constant([1, i], tf.int64))[1] for i in range(500)]
    )
    area, aspect = sizes.prod(axis=1) / (400 * 500), sizes[:, 1] / sizes[:, 0]
    assert 0.078 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="needs the ImageNet photos")
def test_original_photos_all_pass():
    for i, path in enumerate(sorted(ORIGINALS.iterdir())):
        check_pixels(path.read_bytes(), i)


def epoch(data, workers, per_worker, seed=1, number=0, first=0, examples=20, batch=10):
    """All workers' micro-batches of an epoch: [update, position in the virtual batch]."""
    plan = make_plan(examples, batch, per_worker, workers, 1)
    parts = []
    for rank in range(workers):
        batches = data.training_batches(plan, rank, seed, number, first)
        pixels, labels = (np.stack(column) for column in zip(*batches))
        updates = plan.updates_per_epoch - first
        assert len(pixels) == updates * plan.micro_steps
        parts.append((pixels.reshape(updates, -1, *data.input_shape), labels.reshape(updates, -1)))
    return tuple(np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))


@pytest.fixture
def opened(folder):
    return imagenet_data.open_folder(folder, SIZE)


@pytest.mark.parametrize("workers, per_worker", [(1, 10), (2, 1)])
def test_a_virtual_batch_holds_the_same_augmented_images(opened, workers, per_worker):
    expected = epoch(opened, 1, 5)
    for a, b in zip(epoch(opened, workers, per_worker), expected):
        np.testing.assert_array_equal(a, b)
    assert expected[0].shape == (2, 10, SIZE, SIZE, 3) and expected[0].dtype == np.float32
    assert expected[1].dtype == np.int32


def test_epochs_and_seeds_differ_and_a_resumed_epoch_does_not(opened):
    pixels, labels = epoch(opened, 1, 5)
    assert (pixels != epoch(opened, 1, 5, number=1)[0]).any()
    assert (pixels != epoch(opened, 1, 5, seed=2)[0]).any()
    for a, b in zip(epoch(opened, 1, 5, first=1), (pixels[1:], labels[1:])):
        np.testing.assert_array_equal(a, b)


def test_each_image_is_seen_once_an_epoch_and_a_batch_may_exceed_it(tmp_path):
    """Images of one colour each: the crop does not change it."""
    colours = np.arange(21) * 12
    solid = {f"{c}.png": encoded(np.full((9, 9, 3), c, np.uint8), "PNG") for c in colours}
    write(tmp_path, solid)
    write(tmp_path, solid, "val")
    data = imagenet_data.open_folder(tmp_path, SIZE)

    def seen(pixels):
        values = np.mean(pixels[..., 0], axis=(-1, -2)) * images.DEVIATION[0] + images.MEAN[0]
        return np.round(255 * values).astype(int).ravel()

    pixels, labels = epoch(data, 3, 7, examples=21, batch=21)
    assert sorted(seen(pixels)) == colours.tolist()
    np.testing.assert_array_equal(seen(pixels) // 12 % 2, labels.ravel())
    pixels, _ = epoch(data, 1, 7, examples=21, batch=42)
    assert sorted(seen(pixels)) == sorted([*colours, *colours])
    for workers in (1, 2, 3):
        parts = [list(data.test_batches(4, rank, workers)) for rank in range(workers)]
        assert len({len(part) for part in parts}) == 1
        batches = list(itertools.chain.from_iterable(parts))
        weights = np.concatenate([w for _, _, w in batches])
        values = np.concatenate([seen(p) for p, _, _ in batches])
        assert sorted(values[weights == 1]) == colours.tolist()
        assert set(weights) <= {0, 1}


def test_the_number_of_threads_changes_no_bit(opened, monkeypatch):
    expected = epoch(opened, 1, 10)
    for threads in (1, 5):
        monkeypatch.setattr(tf.data, "AUTOTUNE", threads)
        for a, b in zip(epoch(opened, 1, 10), expected):
            np.testing.assert_array_equal(a, b)


def test_batches_may_be_iterated_again(opened):
    batches = opened.test_batches(4, 0, 1)
    for a, b in zip(batches, batches, strict=True):
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x, y)


GOOD = encoded(photo(np.random.default_rng(5), 200, 160))
DAMAGED = {
    "truncated": GOOD[: len(GOOD) * 9 // 10],
    "almost whole": GOOD[:-2],
    "empty": b"",
    "text": b"404 Not Found\n" * 50,
    "head alone": GOOD[:3],
    "PNG head alone": b"\x89PNG\r\n\x1a\n",
    "damaged inside": GOOD[:200] + bytes(4000) + GOOD[4200:],
    "huge JPEG": GOOD.replace(b"\x00\xc8\x00\xa0", b"\xff\xdc\xff\xdc", 1),
    "huge PNG": encoded(np.zeros((4, 4, 3), np.uint8), "PNG").replace(
        b"\x00\x00\x00\x04" * 2, b"\x7f\xff\xff\xff" * 2
    ),
    "GIF": encoded(np.zeros((4, 4, 3), np.uint8), "GIF"),
}


@pytest.mark.parametrize("kind", [kind for kind in DAMAGED if kind != "damaged inside"])
def test_a_damaged_image_is_an_error_that_names_the_file(folder, kind):
    path = folder / "train" / "class1" / "05.JPEG"
    path.write_bytes(DAMAGED[kind])
    data = imagenet_data.open_folder(folder, SIZE)
    with pytest.raises(ValueError, match=rf"{path}: .*--max_corrupt_examples=N") as error:
        epoch(data, 1, 7, examples=21, batch=21)
    assert "Graph execution error" not in str(error.value) and "{{" not in str(error.value)


def test_images_that_are_all_damaged_are_an_error(folder):
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(b"")
    data = imagenet_data.open_folder(folder, SIZE, max_corrupt_examples=100)
    with pytest.raises(images.DamagedImageError, match="is damaged, and so are the 21 tried"):
        epoch(data, 1, 7, examples=21, batch=21)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(folder):
    (folder / "train" / "class1" / "a_folder.JPEG").mkdir()  # no image, and not taken for one
    data = imagenet_data.open_folder(folder, SIZE, max_corrupt_examples=100)
    assert data.examples == 21
    (folder / "train" / "class1" / "05.JPEG").unlink()
    with pytest.raises(OSError, match=r"class1/05\.JPEG.*No such file"):
        epoch(data, 1, 7, examples=21, batch=21)


def test_damage_inside_a_file_ends_in_an_image_or_an_error():
    """The decoder conceals some of it."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        data = bytearray(GOOD if trial else DAMAGED["damaged inside"])
        for position in rng.integers(2, len(data), trial % 7):
            data[position] = rng.integers(256)
        try:
            images.training_image(
                tf.constant(bytes(data)), tf.constant([1, trial], tf.int64), tf.constant(False), 8
            )
        except tf.errors.InvalidArgumentError:
            pass


def test_damaged_images_are_replaced_up_to_a_number(folder, caplog):
    clean = epoch(imagenet_data.open_folder(folder, SIZE), 1, 7, examples=21, batch=21)
    bad = [folder / "train" / f"class{i % 2}" / f"{i:02}.JPEG" for i in (4, 5, 20)]
    for path, kind in zip(bad, ("truncated", "empty", "text")):
        path.write_bytes(DAMAGED[kind])
    data = imagenet_data.open_folder(folder, SIZE, max_corrupt_examples=3)
    pixels, labels = epoch(data, 1, 7, examples=21, batch=21)
    assert data.skipped == {str(path) for path in bad}
    warnings = [record.message for record in caplog.records if "damaged" in record.message]
    assert len(warnings) == 3 and "(3/3)" in warnings[2]
    differing = (pixels != clean[0]).any(axis=(0, 2, 3, 4))
    assert differing.sum() == 3
    # Each is replaced by the image that follows in the order, with its label.
    for place in np.nonzero(differing)[0]:
        following = place + 1
        while differing[following % 21]:
            following += 1
        assert labels[0, place] == clean[1][0, following % 21]
    # However the batch is divided, and again in another epoch, without another count.
    for divided in (epoch(data, 1, 21, examples=21, batch=21), epoch(data, 3, 7, batch=21)):
        np.testing.assert_array_equal(divided[0], pixels)
    epoch(data, 1, 7, number=1, examples=21, batch=21)
    assert len(data.skipped) == 3
    with pytest.raises(ValueError, match="now 2"):
        epoch(imagenet_data.open_folder(folder, SIZE, 2), 1, 7, examples=21, batch=21)


def test_a_damaged_test_image_has_no_weight(folder):
    (folder / "validation" / "class1" / "03.JPEG").write_bytes(b"")
    data = imagenet_data.open_folder(folder, SIZE, max_corrupt_examples=1)
    weights = [w.numpy() for rank in range(2) for _, _, w in data.test_batches(2, rank, 2)]
    assert [len(w) for w in weights] == [2] * 4 and np.sum(weights) == 6
    data = imagenet_data.open_folder(folder, SIZE)
    with pytest.raises(ValueError, match=r"validation/class1/03\.JPEG"):
        list(data.test_batches(2, 0, 1))


def test_folders_that_lack_something(folder):
    with pytest.raises(ValueError, match="max_corrupt_examples=-1"):
        imagenet_data.open_folder(folder, SIZE, -1)
    (folder / "validation" / "class7").mkdir()
    with pytest.raises(ValueError, match="validation/class7 holds no images"):
        imagenet_data.open_folder(folder, SIZE)
    (folder / "validation" / "class7" / "a.jpg").write_bytes(GOOD)
    with pytest.raises(ValueError, match="differ: class7"):
        imagenet_data.open_folder(folder, SIZE)
    (folder / "validation").rename(folder / "other")
    with pytest.raises(FileNotFoundError, match="no folder validation or val"):
        imagenet_data.open_folder(folder, SIZE)
    (folder / "other" / "train").mkdir()
    (folder / "other" / "val").mkdir()
    with pytest.raises(ValueError, match="other/train holds no class folders"):
        imagenet_data.open_folder(folder / "other", SIZE)
    with pytest.raises(FileNotFoundError, match=r"missing holds no folder train"):
        imagenet_data.open_folder(folder / "missing", SIZE)


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
        imagenet_data.open_tfds(prepared, SIZE),
        imagenet_data.open_folder(folder, SIZE),
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
    data = imagenet_data.open_tfds(prepared, SIZE)
    plan = make_plan(data.examples, data.examples, data.examples, 1, 1)
    with pytest.raises(ValueError, match=r"damaged image \S+\.JPEG \(at byte \d+ of .*train"):
        list(data.training_batches(plan, 0, 0, 0, 0))
    file.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="ends within record"):
        imagenet_data.open_tfds(prepared, SIZE)


def test_tensorflow_datasets_that_are_not_there(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match=r"tfds build imagenet2012"):
        imagenet_data.open_tfds(tmp_path, SIZE)


def test_synthetic_images_have_the_same_form():
    data = imagenet_data.Synthetic(SIZE, classes=7, examples=100)
    pixels, labels = epoch(data, 2, 5, first=3, examples=data.examples, batch=20)
    assert pixels.shape == (2, 20, SIZE, SIZE, 3) and labels.max() < 7
    ((pixels, labels, weights),) = data.test_batches(4, 1, 2)
    assert pixels.shape == (4, *data.input_shape) and weights.numpy().tolist() == [1] * 4


def test_the_benchmark_runs(tmp_path, capsys):
    bench_input.write_photos(tmp_path, count=12, copies=2, classes=2)
    result = bench_input.bench(tmp_path, size=16, batch=4, seconds=0.05, repeats=1)
    assert set(result["speed_ratios"]) == {"keras", "keras_fixed_crop"}
    assert "images/s" in capsys.readouterr().out
