"""Photos on disk and their input pipeline: the same examples whatever the number of workers."""

import hashlib
import itertools

import numpy as np
import tensorflow as tf

from trainers.data.damage import Batches, Damage
from trainers.data.decode import test_image, training_image
from trainers.data.order import epoch_indices, own_places


class Photos:
    """Photos with labels that are read when they are needed.

    Args:
        train, test: `Folder` or `Records` of `trainers.data.sources`.
        class_names: list of strings, in the order of the labels.
        image_size: int, height and width of the images.
        max_corrupt_examples: int, how many different damaged files are skipped, in training and
            evaluation together, before one is an error.
    """

    def __init__(self, train, test, class_names, image_size, max_corrupt_examples=0):
        self.class_names = class_names
        self.classes = len(class_names)
        self.image_size = image_size
        self.examples, self.test_examples = len(train), len(test)
        self._train, self._test = train, test
        self._damage = Damage(max_corrupt_examples)

    @property
    def digest(self):
        """Tells whether these are the same examples in the same order."""
        parts = (self._train.digest, self._test.digest, "\n".join(self.class_names))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def skipped(self):
        """The names of the damaged files met so far, a set that grows."""
        return self._damage.names

    def training_batches(self, plan, rank, seed, epoch, first_update):
        """This worker's micro-batches of an epoch, `plan.micro_steps` for each update.

        A damaged image is replaced by the one that follows in the epoch's order, cropped with this
        place's own random numbers.

        Args:
            plan: a `BatchPlan`.
            rank: int, this worker's number.
            seed, epoch: ints, with the position in the epoch the only source of randomness.
            first_update: int, the update of this epoch to begin with.

        Returns:
            An iterable of `(images, labels)`: float32 `(b, size, size, 3)`, normalised, and int32
            `(b,)`. Iterating raises a ValueError that names the file when there are more than
            `max_corrupt_examples` damaged ones.
        """
        count = plan.updates_per_epoch * plan.global_batch_size
        order = epoch_indices(self.examples, count, seed, epoch)
        places = own_places(plan, rank, first_update)
        # One stream for whether a place is mirrored, and a key for the crops.
        generator = np.random.default_rng([seed, epoch])
        key = int(generator.integers(2**62))
        mirrored = generator.integers(2, size=count, dtype=bool)

        def make(index, place, mirrored):
            data, label = self._train.load(index)
            seeds = tf.stack([key, place])
            return training_image(data, seeds, mirrored, self.image_size), label

        def replace(row, attempt):
            _, place, mirrored = row
            return order[(place + attempt) % count], place, mirrored

        rows = (order[places], places, mirrored[places])
        batch_size = plan.per_worker_batch_size
        return Batches(rows, batch_size, make, replace, self._train.name, self._damage)

    def test_batches(self, batch_size, rank, workers):
        """This worker's part of the test images.

        Returns:
            An iterable of `(images, labels, weights)` with the same number of batches on all
            workers; the weights, float32, are 0 for images that only fill up or stand for a
            damaged one. Raises as that of `training_batches`.
        """
        steps = -(-self.test_examples // (batch_size * workers))
        indices = np.arange(steps * batch_size * workers)[rank::workers]
        weights = (indices < self.test_examples).astype(np.float32)

        def make(index, weight):
            data, label = self._test.load(index)
            return test_image(data, self.image_size), label, weight

        def replace(row, attempt):
            return (row[0] + attempt) % self.test_examples, np.float32(0)

        rows = (np.minimum(indices, self.test_examples - 1), weights)
        return Batches(rows, batch_size, make, replace, self._test.name, self._damage)


class Synthetic:
    """The same random images in each batch: for measuring all but the input.

    Args:
        image_size: int.
        classes: int.
        examples: int, what an epoch is taken to have.
    """

    def __init__(self, image_size, classes=1000, examples=1_281_167):
        self.image_size, self.classes, self.examples = image_size, classes, examples
        self.skipped = set()
        self.class_names = None
        self.digest = ""

    def training_batches(self, plan, rank, seed, epoch, first_update):
        """As `Photos.training_batches`, with one batch again and again."""
        steps = (plan.updates_per_epoch - first_update) * plan.micro_steps
        return itertools.repeat(self._batch(plan.per_worker_batch_size, rank), steps)

    def test_batches(self, batch_size, rank, workers):
        """One batch of the form of `Photos.test_batches`."""
        return [(*self._batch(batch_size, rank), tf.ones(batch_size))]

    def _batch(self, batch_size, rank):
        shape = (batch_size, self.image_size, self.image_size, 3)
        pixels = tf.random.stateless_normal(shape, [0, rank])
        labels = tf.random.stateless_uniform(
            (batch_size,), [1, rank], maxval=self.classes, dtype=tf.int32
        )
        return pixels, labels
