"""From the bytes of a photo to an image for the model.

A JPEG is decoded inside its crop only, and that part has the very bits that decoding the whole
would give. What the decoder cannot read ends in a `tf.errors.InvalidArgumentError`; it conceals
some damage inside a file.
"""

import tensorflow as tf

# Of ImageNet's channels, for pixels from 0 to 1.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CENTRAL_CROP = 0.875

# More would only be a trap: the largest photo of ImageNet has 61 million.
MAX_PIXELS = 100_000_000

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
