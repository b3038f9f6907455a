"""Damaged photos: batches that survive them, and how many may be skipped."""

import re

import tensorflow as tf
from absl import logging

from trainers.data.order import without_autotuning

# How TensorFlow says that a file cannot be read: no fault of the image.
UNREADABLE = (
    tf.errors.FailedPreconditionError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
)


def reason_of(error):
    """What TensorFlow says last, without the nodes of its graphs."""
    lines = re.sub(r"\{\{[^}]*\}\}\s*", "", error.message.partition("[[")[0]).split("\n")
    return [line.strip() for line in lines if line.strip()][-1]


class Batches:
    """Batches of what a graph function makes of rows; may be iterated several times.

    TensorFlow's graphs cannot catch an error, and a guard around each image would cost all of them.
    So the pipeline has none: when it fails, the batch that failed is made again image by image,
    and a new pipeline starts behind it.

    Args:
        rows: tuple of arrays, the columns; the first holds the indices of examples.
        batch_size: int.
        make: graph function of one row to the tensors of one example.
        replace: function of (a row whose image is damaged, attempt 1, 2, ...) to another row.
        name: function of an index to the file's name.
        damage: a `Damage`.
    """

    def __init__(self, rows, batch_size, make, replace, name, damage):
        self._rows = rows
        self._batch_size = batch_size
        self._make = tf.function(make, autograph=False)
        self._replace, self._name, self._damage = replace, name, damage

    def __len__(self):
        return len(self._rows[0]) // self._batch_size

    def __iter__(self):
        done = 0
        try:
            while done < len(self):
                try:
                    for batch in self._pipeline(done):
                        yield batch
                        done += 1
                except tf.errors.InvalidArgumentError as error:
                    yield self._repaired(done, error)
                    done += 1
        except UNREADABLE as error:
            raise OSError(reason_of(error)) from error

    def _pipeline(self, first):
        rows = tuple(column[first * self._batch_size :] for column in self._rows)
        dataset = tf.data.Dataset.from_tensor_slices(rows)
        dataset = dataset.map(self._make, tf.data.AUTOTUNE, deterministic=True)
        dataset = dataset.batch(self._batch_size, drop_remainder=True).prefetch(2)
        return without_autotuning(dataset)

    def _repaired(self, number, error):
        """Batch `number` with its damaged images replaced."""
        begin, met = number * self._batch_size, self._damage.met
        examples = []
        with tf.device("CPU"):
            for i in range(begin, begin + self._batch_size):
                examples.append(self._whole_example(tuple(column[i] for column in self._rows)))
            if self._damage.met == met:  # then it was something else
                raise error
            return tuple(tf.stack(column) for column in zip(*examples))

    def _whole_example(self, row):
        candidate = row
        for attempt in range(1, 1 + len(self._rows[0])):
            try:
                return self._make(*(tf.convert_to_tensor(value) for value in candidate))
            except tf.errors.InvalidArgumentError as error:
                self._damage.add(self._name(candidate[0]), error)
                candidate = self._replace(row, attempt)
        raise DamagedImageError(
            f"{self._name(row[0])} is damaged, and so are the {attempt} tried in its place"
        )


class DamagedImageError(ValueError):
    """A file is damaged, and no more may be skipped."""


class Damage:
    """Counts damaged files; each warns once.

    Args:
        limit: int, how many may be skipped.
    """

    def __init__(self, limit):
        if limit < 0:
            raise ValueError(f"max_corrupt_examples={limit} must not be negative")
        self.limit, self.names, self.met = limit, set(), 0

    def add(self, name, error):
        """Notes a damaged file.

        Raises:
            DamagedImageError: if it is one more than the limit.
        """
        self.met += 1
        if name in self.names:
            return
        reason = reason_of(error)
        if len(self.names) >= self.limit:
            raise DamagedImageError(
                f"damaged image {name}: {reason}. Replace it, or skip up to N such files on each "
                f"worker with --max_corrupt_examples=N (now {self.limit})"
            ) from error
        self.names.add(name)
        count = len(self.names)
        logging.warning("skipped damaged image %s: %s (%d/%d)", name, reason, count, self.limit)
