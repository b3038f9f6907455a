"""Data sets in memory: the same examples whatever the number of workers."""

import numpy as np
import pytest
import tensorflow as tf

from tests.support.launch import CIFAR100
from trainers.data import memory
from trainers.data.order import epoch_indices
from trainers.engine.plan import make_plan


@pytest.fixture(scope="module")
def digits():
    return memory.DATA_SETS["digits"].load(None, False)


def epoch(digits, workers, per_worker, seed=1, number=0, first=0):
    """All workers' micro-batches of an epoch: [update, position in the virtual batch]."""
    plan = make_plan(1437, 256, per_worker, workers, 1)
    parts = []
    for rank in range(workers):
        batches = list(memory.training_batches(digits, plan, rank, seed, number, first))
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
    crops = memory._augment(tf.constant(pixels), tf.constant(draws, tf.int32), 1).numpy()
    padded = np.pad(pixels, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for crop, image, (top, left, _) in zip(crops, padded, draws):
        np.testing.assert_array_equal(crop, image[top : top + 8, left : left + 8])
    draws[:, 2] = 1
    mirrored = memory._augment(tf.constant(pixels), tf.constant(draws, tf.int32), 1).numpy()
    np.testing.assert_array_equal(mirrored, crops[:, :, ::-1])


def test_an_epoch_sees_every_image_once_and_a_huge_batch_wraps_around():
    order = epoch_indices(100, 100, 0, 0)
    assert sorted(order) == list(range(100))
    wrapped = epoch_indices(100, 250, 0, 0)
    counts = np.bincount(wrapped, minlength=100)
    assert counts.min() == 2 and counts.max() == 3


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_test_image_counts_once(digits, workers):
    parts = [list(memory.test_batches(digits, 50, rank, workers)) for rank in range(workers)]
    assert len({len(part) for part in parts}) == 1
    labels = np.concatenate([y[w > 0] for part in parts for _, y, w in part])
    assert sorted(labels) == sorted(digits.test[1])


def test_digits_are_split_once_and_for_all(digits):
    assert (len(digits.train[1]), len(digits.test[1])) == (1437, 360)
    seen = {image.tobytes() for image in digits.train[0]}
    assert not any(image.tobytes() in seen for image in digits.test[0])


def test_reduced_images_are_means_of_blocks(digits):
    found = memory.reduced(digits, 4)
    assert found.train[0].shape == (1437, 4, 4, 1) and found.padding == 1
    image = digits.test[0][5].astype(float)
    for i, j in np.ndindex(4, 4):
        mean = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean()
        assert abs(found.test[0][5, i, j, 0] - mean) <= 0.5
    assert found.test[1] is digits.test[1] and not found.flip


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="CIFAR-100 is not there")
def test_cifar100_is_loaded_whole():
    cifar = memory.DATA_SETS["cifar100"].load(str(CIFAR100), False)
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
        memory.DATA_SETS["cifar100"].load(str(tmp_path), False)
