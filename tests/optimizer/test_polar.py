"""Polar factors, against singular value decompositions in float64."""

import numpy as np
import pytest

from nlcg_tf.polar import polar_factors

SHAPES = [(64, 32), (32, 64), (576, 64), (24, 24), (1, 50), (50, 1), (1, 1)]


def of_svd(matrix):
    u, _, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return u @ v


def with_values(rng, shape, values):
    u, _, v = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return u * values @ v


def values_of(factor):
    return np.linalg.svd(np.asarray(factor, np.float64), compute_uv=False)


def only(matrix):
    (factor,) = polar_factors([matrix])
    return np.asarray(factor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lowest", [1.0, 10**-2.5])
def test_values_down_to_a_three_hundredth_become_one(dtype, lowest, rng):
    """Of all shapes in one call, whose equal ones share their products."""
    values = [np.geomspace(1, lowest, min(shape)) for shape in SHAPES]
    matrices = [with_values(rng, s, v).astype(dtype) for s, v in zip(SHAPES, values)]
    for matrix, factor in zip(matrices, polar_factors(matrices)):
        factor = np.asarray(factor)
        assert factor.dtype == dtype and factor.shape == matrix.shape
        np.testing.assert_allclose(values_of(factor), 1, atol=2e-3)
        np.testing.assert_allclose(factor, of_svd(matrix), atol=2e-3)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e37])
def test_the_size_of_a_matrix_does_not_matter(size, rng):
    matrix = rng.normal(size=(30, 20))
    np.testing.assert_allclose(only((matrix * size).astype("float32")), of_svd(matrix), atol=2e-3)


def test_smaller_values_stay_between_zero_and_one(rng):
    """Of what rounding leaves of a rank that is not full too."""
    factor = only(with_values(rng, (200, 40), np.geomspace(1, 1e-9, 40)).astype("float32"))
    assert values_of(factor).max() < 1.002
    one = np.outer(rng.normal(size=40), rng.normal(size=30)).astype("float32")
    factor = only(one)
    np.testing.assert_allclose(factor, one / np.linalg.norm(one), atol=2e-3)
    assert values_of(factor)[1] < 1e-2


def test_nothing_becomes_of_zeros_or_of_no_elements():
    matrices = [np.zeros((4, 3), "float32"), np.zeros((0, 3), "float32"), np.ones((2, 0))]
    for matrix, factor in zip(matrices, polar_factors(matrices)):
        np.testing.assert_array_equal(np.asarray(factor), matrix)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_element_that_is_not_finite_spoils_its_matrix_alone(bad, rng):
    good, spoiled = (rng.normal(size=(8, 5)).astype("float32") for _ in range(2))
    spoiled[2, 3] = bad
    factors = [np.asarray(x) for x in polar_factors([good, spoiled])]
    np.testing.assert_allclose(factors[0], of_svd(good), atol=2e-3)
    assert not np.isfinite(factors[1]).any()
