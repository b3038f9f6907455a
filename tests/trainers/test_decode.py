"""Decoding, cropping and normalising of photos, against a float64 reference."""

import io

import numpy as np
import pytest
import tensorflow as tf

from tests.support.photos import ORIGINALS, SIZE, TOLERANCE, encoded, photo
from trainers.data import decode

Image = pytest.importorskip("PIL.Image")


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
    return (pixels / 255 - decode.MEAN) / decode.DEVIATION


@tf.function
def images_of(data, seeds):
    """A training image as it is and mirrored, and the test image."""
    pair = [decode.training_image(data, seeds, tf.constant(m), SIZE) for m in (False, True)]
    return (*pair, decode.test_image(data, SIZE))


def check_pixels(data, seed):
    """Training and test image of a file against the reference."""
    seeds = tf.constant([seed, 7], tf.int64)
    height, width = np.asarray(Image.open(io.BytesIO(data))).shape[:2]
    begin, size = decode.random_window(tf.constant([height, width, 3]), seeds)
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
    decoded = decode.decode(tf.constant(data), lambda shape: (0 * shape[:2], shape[:2])).numpy()
    np.testing.assert_allclose(decoded, pixels, atol=6)
    window = tf.constant([[3, 5], [20, 11]])
    part = decode.decode(tf.constant(data), lambda _: tf.unstack(window)).numpy()
    np.testing.assert_array_equal(part, decoded[3:23, 5:16])


def test_random_windows_have_the_right_areas_and_aspects():
    shape = tf.constant([400, 500, 3])
    sizes = np.array(
        [decode.random_window(shape, tf.constant([1, i], tf.int64))[1] for i in range(500)]
    )
    area, aspect = sizes.prod(axis=1) / (400 * 500), sizes[:, 1] / sizes[:, 0]
    assert 0.078 < area.min() < 0.1 and 0.9 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.78 and 1.28 < aspect.max() < 1.35


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="needs the ImageNet photos")
def test_original_photos_all_pass():
    for i, path in enumerate(sorted(ORIGINALS.iterdir())):
        check_pixels(path.read_bytes(), i)
