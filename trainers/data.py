"""Images in memory and their input pipelines: the same examples whatever the number of workers."""

import dataclasses
import re

import numpy as np
import tensorflow as tf

TRAINING_EXAMPLES = {"digits": 1437, "cifar10": 50000, "cifar100": 50000}
TEST_EXAMPLES = 10000  # of cifar10 and cifar100
IMAGE_SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


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


def load(dataset, data_dir=None, download=False):
    """Loads a data set.

    Args:
        dataset: `"digits"`, the UCI handwritten digits inside scikit-learn (1,437 training and 360
            test images of 8x8 pixels), or `"cifar10"`, `"cifar100"` through TensorFlow Datasets.
        data_dir: folder of TensorFlow Datasets, or `None` for its default.
        download: whether TensorFlow Datasets may download.

    Raises:
        FileNotFoundError: if the data are not there and may not be downloaded.
        OSError: if a file is damaged or missing, with its name.
    """
    if dataset == "digits":
        return _digits()
    import tensorflow_datasets as tfds

    try:
        train, test = tfds.load(
            dataset,
            split=["train", "test"],
            batch_size=-1,
            as_supervised=True,
            data_dir=data_dir,
            download=download,
        )
    except (AssertionError, tfds.core.registered.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{dataset} is not prepared under --data_dir={data_dir}. "
            "Pass --download, or the folder that holds it."
        ) from error
    except tf.errors.OpError as error:
        builder = tfds.builder(dataset, data_dir=data_dir)
        files = [
            path for split in ("train", "test") for path in builder.info.splits[split].filepaths
        ]
        raise OSError(
            f"{dataset} under --data_dir={data_dir} cannot be read: "
            f"{', '.join(filter(None, map(_damage, files))) or reason_of(error)}. Prepare it again"
        ) from error
    for name, (_, labels), count in (
        ("train", train, TRAINING_EXAMPLES[dataset]),
        ("test", test, TEST_EXAMPLES),
    ):
        if len(labels) != count:
            raise OSError(
                f"{dataset} under --data_dir={data_dir} has {len(labels):,} images in the {name} "
                f"split, not {count:,}. Prepare it again"
            )
    train, test = (
        (images.numpy(), labels.numpy().astype(np.int32)) for images, labels in (train, test)
    )
    return ImageData(train, test, padding=4, flip=True)


def reason_of(error):
    """What TensorFlow says last, without the nodes of its graphs."""
    lines = re.sub(r"\{\{[^}]*\}\}\s*", "", error.message.partition("[[")[0]).split("\n")
    return [line.strip() for line in lines if line.strip()][-1]


def _damage(path):
    """What is wrong with a TFRecord file, or `None`."""
    try:
        for _ in tf.data.TFRecordDataset(str(path)):
            pass
    except tf.errors.OpError as error:
        return f"{path}: {reason_of(error)}"
    return None


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images[..., None].astype(np.uint8)
    labels = digits.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=360, random_state=0, stratify=labels
    )
    return ImageData((train_x, train_y), (test_x, test_y), padding=1, flip=False)


def epoch_indices(examples, count, seed, epoch):
    """The examples of an epoch in their order: permutations of all, one after another.

    Args:
        examples: number of training examples.
        count: how many indices are needed; more than `examples` if one batch is larger than that.
        seed, epoch: ints, which alone decide the order.
    """
    passes = -(-count // examples)
    orders = [np.random.default_rng([seed, epoch, i]).permutation(examples) for i in range(passes)]
    return np.concatenate(orders)[:count]


def training_batches(data, plan, rank, seed, epoch, first_update):
    """This worker's micro-batches of an epoch, `plan.micro_steps` for each update.

    Update u takes examples [u B, (u + 1) B) of the epoch's order, and worker r the r-th of the W
    equal parts of these: so a virtual batch holds the same examples as a real one.

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
    positions = (
        np.arange(count)
        .reshape(
            plan.updates_per_epoch, plan.workers, plan.micro_steps * plan.per_worker_batch_size
        )[first_update:, rank]
        .ravel()
    )
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


def without_autotuning(dataset):
    """A dataset whose parallelism stays as it begins: one call a core, at most 16.

    The end of an autotuned iterator can wait for its tuner's next period, up to a minute: the tuner
    is told to stop before the flag at which it looks is set (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


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
