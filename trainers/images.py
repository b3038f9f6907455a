"""From the bytes of a photo to an image for the model, and batches that survive damaged ones.

A JPEG is decoded inside its crop only, and that part has the very bits that decoding the whole
would give. What the decoder cannot read ends in a `tf.errors.InvalidArgumentError`; it conceals
some damage inside a file.
"""

import tensorflow as tf
from absl import logging

from trainers.data import reason_of, without_autotuning

# Of ImageNet's channels, for pixels from 0 to 1.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CENTRAL_CROP = 0.875

# More would only be a trap: the largest photo of ImageNet has 61 million.
MAX_PIXELS = 100_000_000

# How TensorFlow says that a file cannot be read: no fault of the image.
UNREADABLE = (
    tf.errors.FailedPreconditionError,
    tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError,
)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_END_OF_JPEG = b"\xff\xd9"


def training_image(data, seeds, mirrored, size):
    """A random part of a photo, mirrored or not.

    Args:
        data: scalar string tensor, the file.
        seeds: int64 `(2,)`, the only source of randomness of the crop.
        mirrored: scalar bool tensor.
        size: int, height and width of the result.

    Returns:
        float32 `(size, size, 3)`, normalised.
    """
    pixels = _resize(decode(data, lambda shape: random_window(shape, seeds)), size)
    pixels = tf.cond(mirrored, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    return _normalise(pixels, size)


def test_image(data, size):
    """The central square of 0.875 of a photo's shorter side, otherwise as `training_image`."""
    return _normalise(_resize(decode(data, central_window), size), size)


def random_window(shape, seeds):
    """A window of 8 to 100 % of the area and an aspect of 3/4 to 4/3; the whole if none fits.

    Args:
        shape: int32 `(3,)`, height, width and channels of a photo.
        seeds: int64 `(2,)`.

    Returns:
        `(begin, size)` as for `tf.slice`: int32 `(2,)`, rows and columns.
    """
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        shape,
        tf.zeros((1, 0, 4)),
        seeds,
        # The "object" is the whole photo here: the default of 0.1 would cut off the small crops.
        min_object_covered=0.0,
        aspect_ratio_range=CROP_ASPECT,
        area_range=CROP_AREA,
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return begin[:2], size[:2]


def central_window(shape):
    """The square in the centre; argument and result as in `random_window`."""
    shorter = tf.cast(tf.reduce_min(shape[:2]), tf.float32)
    side = tf.maximum(tf.cast(tf.round(CENTRAL_CROP * shorter), tf.int32), 1)
    return (shape[:2] - side) // 2, tf.stack([side, side])


def decode(data, choose_window):
    """The part of a JPEG or PNG inside a window, whatever the file's name says.

    Args:
        data: scalar string tensor, the file.
        choose_window: function of the photo's shape; see `random_window`.

    Returns:
        uint8 `(height, width, 3)` of the window; greyscale and CMYK as RGB.

    Raises:
        tf.errors.InvalidArgumentError: when run, if the file is damaged, of another format, or of
            more than `MAX_PIXELS`.
    """
    pixels = tf.cond(
        tf.io.is_jpeg(data),
        lambda: _decode_jpeg(data, choose_window),
        lambda: _decode_png(data, choose_window),
    )
    return tf.ensure_shape(pixels, (None, None, 3))


def _decode_jpeg(data, choose_window):
    # Few operations, on vectors: for small photos their calls cost as much as the decoding.
    shape = tf.image.extract_jpeg_shape(data)
    with tf.control_dependencies([_check_size(shape)]):
        begin, size = choose_window(shape)
    # The decoder interpolates colour between pixels: one more on each side, and the edges of the
    # window are right too.
    first = tf.maximum(begin - 1, 0)
    last = tf.minimum(begin + size + 1, shape[:2])
    # The decoder stops below its window, and would not see that the file was cut off further down.
    # So a file without its end mark is decoded whole: that fails if something is missing.
    complete = tf.strings.substr(data, -2, 2) == _END_OF_JPEG
    first = tf.where(complete, first, 0)
    last = tf.where(complete, last, shape[:2])
    pixels = tf.image.decode_and_crop_jpeg(
        data,
        tf.concat([first, last - first], 0),
        channels=3,
        # The default is off by up to 24 of 255 and hardly faster.
        dct_method="INTEGER_ACCURATE",
    )
    return _cut(pixels, begin - first, size)


def _decode_png(data, choose_window):
    # tf.io.decode_png alone would take other formats too.
    is_png = tf.strings.substr(data, 0, len(_PNG_SIGNATURE)) == _PNG_SIGNATURE
    check = tf.raw_ops.Assert(condition=is_png, data=["neither a JPEG nor a PNG file"])
    with tf.control_dependencies([check]):
        # Bytes 16 to 23 are width and height; a shorter file fails in the decoder.
        padded = tf.strings.join([data, b"\0" * 24])
    header = tf.io.decode_raw(tf.strings.substr(padded, 16, 8), tf.int32, little_endian=False)
    with tf.control_dependencies([_check_size(header)]):
        pixels = tf.io.decode_png(data, channels=3)
    return _cut(pixels, *choose_window(tf.shape(pixels)))


def _check_size(shape):
    few = tf.reduce_prod(tf.cast(shape[:2], tf.int64)) <= MAX_PIXELS
    return tf.raw_ops.Assert(condition=few, data=[f"more than {MAX_PIXELS} pixels"])


def _cut(pixels, begin, size):
    return tf.slice(pixels, tf.pad(begin, [[0, 1]]), tf.pad(size, [[0, 1]], constant_values=-1))


def _resize(pixels, size):
    # Of floats the resizing takes half the time that it takes of bytes.
    return tf.image.resize(tf.cast(pixels, tf.float32), (size, size))


def _normalise(pixels, size):
    # Whole rows at once: TensorFlow spreads a vector of three over an image five times slower.
    scale = tf.tile([1 / (255 * deviation) for deviation in DEVIATION], [size])
    offset = tf.tile([-mean / deviation for mean, deviation in zip(MEAN, DEVIATION)], [size])
    rows = tf.reshape(pixels, (size, 3 * size)) * scale + offset
    return tf.reshape(rows, (size, size, 3))


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
