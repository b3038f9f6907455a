"""Polar factors of matrices, without a singular value decomposition."""

import contextlib
import contextvars
import math

from keras import ops

# The odd polynomials a x + b x^3 + c x^5 that one after the other bring singular values nearest to
# 1, from 1e-3 on: Polar Express (Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932).
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
# What computes polar factors where several workers share the work; see `shared_by`.
_shared = contextvars.ContextVar("shared", default=None)
# Rounding may push a value out of the interval that a polynomial is made for, where it would grow.
SAFETY = 1.01


def polar_factors(matrices):
    """The nearest matrices with orthonormal columns (orthonormal rows, if a matrix is wide).

    For G = U S V^T the polar factor is U V^T = G (G^T G)^(-1/2): each singular value becomes 1. For
    singular values of at least 10^-2.5 times the largest, the result is within 0.2 % of 1. Smaller
    values end below 1, and 0 stays 0. Matrices of the same shape, or of that shape transposed, are
    multiplied together in one batch.

    Args:
        matrices: list of tensors `(rows, columns)`, float32 or float64.

    Returns:
        A list of tensors of the same shapes. Of a matrix with an element that is infinite or NaN
        nothing is finite.
    """
    share = _shared.get()
    return _own_factors(matrices) if share is None else share(matrices, _own_factors)


@contextlib.contextmanager
def shared_by(share):
    """Context in which workers share the polar factors among them.

    Args:
        share: function of `(matrices, compute)`, equal matrices on all workers and what computes
            the factors of a list of them, to the factors of all.
    """
    token = _shared.set(share)
    try:
        yield
    finally:
        _shared.reset(token)


def matrix_shape(shape):
    """A kernel as a matrix: its rows are all dimensions but the last. A vector is a row."""
    shape = tuple(shape)
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def operations(shape):
    """About how many multiplications the polar factor of a matrix takes."""
    long, short = max(shape), min(shape)
    return len(COEFFICIENTS) * (2 * long + short) * short**2


def _own_factors(matrices):
    groups = {}
    for i, matrix in enumerate(matrices):
        shape = tuple(matrix.shape)
        if math.prod(shape):
            groups.setdefault((max(shape), min(shape)), []).append(i)
    factors = list(matrices)
    for shape, members in groups.items():
        tall = [_oriented(matrices[i], shape) for i in members]
        for i, factor in zip(members, ops.unstack(newton_schulz(ops.stack(tall)), len(members))):
            factors[i] = factor if tuple(matrices[i].shape) == shape else ops.transpose(factor)
    return factors


def newton_schulz(x):
    """The polar factors of a batch of tall matrices `(batch, rows, columns)`."""
    # Squares must neither overflow nor vanish.
    largest = ops.max(ops.abs(x), axis=(1, 2), keepdims=True)
    x = x / ops.where(largest > 0, largest, ops.ones_like(largest))
    gram = ops.matmul(ops.swapaxes(x, 1, 2), x)
    # ||X^T X||^(1/2) lies between the largest singular value and ||X||.
    bound = 1.02 * ops.sqrt(ops.sqrt(ops.sum(gram * gram, axis=(1, 2), keepdims=True)))
    bound = ops.where(bound > 0, bound, ops.ones_like(bound))
    x, gram = x / bound, gram / (bound * bound)
    for k, (a, b, c) in enumerate(COEFFICIENTS):
        if k:
            gram = ops.matmul(ops.swapaxes(x, 1, 2), x)
        if k < len(COEFFICIENTS) - 1:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        x = a * x + ops.matmul(x, b * gram + c * ops.matmul(gram, gram))
    return x


def _oriented(matrix, shape):
    return matrix if tuple(matrix.shape) == shape else ops.transpose(matrix)
