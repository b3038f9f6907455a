"""Images in memory and their input pipelines: the same examples whatever the number of workers."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainers.data.damage import reason_of
from trainers.data.order import epoch_indices, own_places, without_autotuning


@dataclasses.dataclass
class ImageData:
    """A data set in memory.

    Attributes:
        train, test: `(images, labels)`; images uint8 `(n, height, width, channels)`, labels int32.
        padding: pixels of zero padding around a training image before its random crop.
        flip: whether training images may be mirrored.
    """

    train: tuple
    test: tuple
    padding: int
    flip: bool


def _tensorflow_dataset(name, counts, data_dir, download):
    """CIFAR through TensorFlow Datasets; `counts` of training and test images.

    Raises:
        FileNotFoundError: if the data are not there and may not be downloaded.
        OSError: if a file is damaged or missing, with its name.
    """
    import tensorflow_datasets as tfds

    data_dir = data_dir or tfds.core.constants.DATA_DIR
    try:
        train, test = tfds.load(
            name,
            split=["train", "test"],
            batch_size=-1,
            as_supervised=True,
            data_dir=data_dir,
            download=download,
        )
    except (AssertionError, tfds.core.registered.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is not prepared under --data_dir={data_dir}. "
            "Pass --download, or the folder that holds it."
        ) from error
    except tf.errors.OpError as error:
        builder = tfds.builder(name, data_dir=data_dir)
        files = [
            path for split in ("train", "test") for path in builder.info.splits[split].filepaths
        ]
        raise OSError(
            f"{name} under --data_dir={data_dir} cannot be read: "
            f"{', '.join(filter(None, map(_damage, files))) or reason_of(error)}. Prepare it again"
        ) from error
    for split, (_, labels), count in zip(("train", "test"), (train, test), counts):
        if len(labels) != count:
            raise OSError(
                f"{name} under --data_dir={data_dir} has {len(labels):,} images in the {split} "
                f"split, not {count:,}. Prepare it again"
            )
    train, test = (
        (images.numpy(), labels.numpy().astype(np.int32)) for images, labels in (train, test)
    )
    return ImageData(train, test, padding=4, flip=True)


def _damage(path):
    """What is wrong with a TFRecord file, or `None`."""
    try:
        for _ in tf.data.TFRecordDataset(str(path)):
            pass
    except tf.errors.OpError as error:
        return f"{path}: {reason_of(error)}"
    return None


def _digits(data_dir, download):
    """The UCI handwritten digits inside scikit-learn: no folder, no download."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    return ImageData((train_x, train_y), (test_x, test_y), padding=1, flip=False)


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set of `trainers.cifar`.

    Attributes:
        training_examples, classes: ints.
        image_shape: `(height, width, channels)`.
        load: function of `(data_dir, download)` to an `ImageData`.
        comes_with: the package that it comes with; `None`: it lies in a folder, to be downloaded.
    """

    training_examples: int
    classes: int
    image_shape: tuple
    load: Callable
    comes_with: str | None = None


def _cifar(classes):
    load = functools.partial(_tensorflow_dataset, f"cifar{classes}", (50_000, 10_000))
    return DataSet(50_000, classes, (32, 32, 3), load)


# To add one, add a line.
DATA_SETS = {
    "digits": DataSet(1437, 10, (8, 8, 1), _digits, comes_with="scikit-learn"),
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
}


def reduced(data, size):
    """An `ImageData` whose images are `size` pixels high and wide, each a mean of a block."""

    def means(images):
        count, height, _, channels = images.shape
        block = height // size
        blocks = images.reshape(count, size, block, size, block, channels)
        return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)

    padding = max(1, data.padding * size // data.train[0].shape[1])
    train, test = ((means(images), labels) for images, labels in (data.train, data.test))
    return dataclasses.replace(data, train=train, test=test, padding=padding)


def training_batches(data, plan, rank, seed, epoch, first_update):
    """This worker's micro-batches of an epoch, `plan.micro_steps` for each update.

    Args:
        data: an `ImageData`.
        plan: a `BatchPlan`.
        rank: int, this worker's number.
        seed, epoch: ints, with the position in the epoch the only source of randomness.
        first_update: int, the update of this epoch to begin with.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32 `(b, height, width, channels)`,
        standardised, and int32 `(b,)`.
    """
    count = plan.updates_per_epoch * plan.global_batch_size
    order = epoch_indices(len(data.train[1]), count, seed, epoch)
    positions = own_places(plan, rank, first_update)
    images, labels = (tf.constant(x) for x in data.train)
    order = tf.constant(order, tf.int32)
    # Three random numbers for each (seed, epoch, position): top and left of the crop, mirrored.
    limits = [2 * data.padding + 1, 2 * data.padding + 1, 2 if data.flip else 1]
    draws = tf.random.stateless_uniform((count, 3), [seed, epoch], maxval=2**30, dtype=tf.int32)
    draws %= limits

    def prepare(positions):
        indices = tf.gather(order, positions)
        pixels = _augment(tf.gather(images, indices), tf.gather(draws, positions), data.padding)
        return tf.image.per_image_standardization(pixels), tf.gather(labels, indices)

    dataset = tf.data.Dataset.from_tensor_slices(positions.astype(np.int32))
    dataset = dataset.batch(plan.per_worker_batch_size, drop_remainder=True)
    dataset = dataset.map(prepare, tf.data.AUTOTUNE, deterministic=True).prefetch(2)
    return without_autotuning(dataset)


def _augment(pixels, draws, padding):
    """Pads the images, crops them at row `draws[:, 0]` and column `draws[:, 1]`, mirrors some."""
    _, height, width, _ = pixels.shape
    top, left, mirrored = tf.unstack(draws, axis=1)
    padded = tf.pad(pixels, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    rows = tf.gather(padded, top[:, None] + tf.range(height), axis=1, batch_dims=1)
    crops = tf.gather(rows, left[:, None] + tf.range(width), axis=2, batch_dims=1)
    return tf.where(mirrored[:, None, None, None] > 0, crops[:, :, ::-1], crops)


def test_batches(data, batch_size, rank, workers):
    """This worker's part of the test images.

    Returns:
        A `tf.data.Dataset` of `(images, labels, weights)` with the same number of batches on all
        workers; the weights are 0 for images that only fill up.
    """
    images, labels = data.test
    steps = -(-len(labels) // (batch_size * workers))
    indices = np.arange(steps * batch_size * workers)[rank::workers]
    weights = (indices < len(labels)).astype(np.float32)
    indices = np.minimum(indices, len(labels) - 1)
    dataset = tf.data.Dataset.from_tensor_slices((images[indices], labels[indices], weights))
    dataset = dataset.batch(batch_size).map(
        lambda x, y, w: (tf.image.per_image_standardization(x), y, w), tf.data.AUTOTUNE
    )
    return without_autotuning(dataset)
