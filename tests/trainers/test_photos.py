"""The pipelines of photos: right pixels, a fixed order, and damaged files."""

import itertools
import os

import numpy as np
import pytest
import tensorflow as tf

from tests.support.photos import GOOD, SIZE, encoded, epoch, write
from trainers.data import damage, decode, sources

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def opened(folder):
    return sources.open_folder(folder, SIZE)


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
    data = sources.open_folder(tmp_path, SIZE)

    def seen(pixels):
        values = np.mean(pixels[..., 0], axis=(-1, -2)) * decode.DEVIATION[0] + decode.MEAN[0]
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
    data = sources.open_folder(folder, SIZE)
    with pytest.raises(ValueError, match=rf"{path}: .*--max_corrupt_examples=N") as error:
        epoch(data, 1, 7, examples=21, batch=21)
    assert "Graph execution error" not in str(error.value) and "{{" not in str(error.value)


def test_images_that_are_all_damaged_are_an_error(folder):
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(b"")
    data = sources.open_folder(folder, SIZE, max_corrupt_examples=100)
    with pytest.raises(damage.DamagedImageError, match="is damaged, and so are the 21 tried"):
        epoch(data, 1, 7, examples=21, batch=21)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(folder):
    (folder / "train" / "class1" / "a_folder.JPEG").mkdir()  # no image, and not taken for one
    data = sources.open_folder(folder, SIZE, max_corrupt_examples=100)
    assert data.examples == 21
    (folder / "train" / "class1" / "05.JPEG").unlink()
    with pytest.raises(OSError, match=r"class1/05\.JPEG.*No such file"):
        epoch(data, 1, 7, examples=21, batch=21)


def test_names_may_be_no_utf8_and_a_broken_link_is_an_image_that_cannot_be_read(folder):
    place = folder / "train" / "class1"
    (place / "05.JPEG").rename(place / os.fsdecode(b"caf\xe9.JPEG"))
    epoch(sources.open_folder(folder, SIZE), 1, 7, examples=21, batch=21)
    (place / "99.JPEG").symlink_to("/nowhere/x.JPEG")
    data = sources.open_folder(folder, SIZE)
    assert data.examples == 22
    with pytest.raises(OSError, match=r"class1/99\.JPEG.*No such file"):
        epoch(data, 1, 11, examples=22, batch=22)


def test_damage_inside_a_file_ends_in_an_image_or_an_error():
    """The decoder conceals some of it."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        data = bytearray(GOOD if trial else DAMAGED["damaged inside"])
        for position in rng.integers(2, len(data), trial % 7):
            data[position] = rng.integers(256)
        try:
            decode.training_image(
                tf.constant(bytes(data)), tf.constant([1, trial], tf.int64), tf.constant(False), 8
            )
        except tf.errors.InvalidArgumentError:
            pass


def test_damaged_images_are_replaced_up_to_a_number(folder, caplog):
    clean = epoch(sources.open_folder(folder, SIZE), 1, 7, examples=21, batch=21)
    bad = [folder / "train" / f"class{i % 2}" / f"{i:02}.JPEG" for i in (4, 5, 20)]
    for path, kind in zip(bad, ("truncated", "empty", "text")):
        path.write_bytes(DAMAGED[kind])
    data = sources.open_folder(folder, SIZE, max_corrupt_examples=3)
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
        epoch(sources.open_folder(folder, SIZE, 2), 1, 7, examples=21, batch=21)


def test_a_damaged_test_image_has_no_weight(folder):
    (folder / "validation" / "class1" / "03.JPEG").write_bytes(b"")
    data = sources.open_folder(folder, SIZE, max_corrupt_examples=1)
    weights = [w.numpy() for rank in range(2) for _, _, w in data.test_batches(2, rank, 2)]
    assert [len(w) for w in weights] == [2] * 4 and np.sum(weights) == 6
    data = sources.open_folder(folder, SIZE)
    with pytest.raises(ValueError, match=r"validation/class1/03\.JPEG"):
        list(data.test_batches(2, 0, 1))
