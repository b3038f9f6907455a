"""The problems of the study: small, ill-conditioned, and without anything to download.

Each is a function without arguments that returns a `Problem`; `PROBLEMS` has them by name. Data do
not depend on the seed of a run, which decides the initial weights and the order of the examples.
"""

import dataclasses
import typing

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

VISCOSITY = 0.01 / np.pi
POISSON_TERMS = ((1.0, 1), (0.1, 4))  # u = sum of amplitude * sin(frequency * pi * x)


@dataclasses.dataclass
class Problem:
    """A training whose loss is to be minimised.

    Attributes:
        make_model: function that returns a new `keras.Model`.
        loss: function (model, *data) -> scalar tensor.
        data: tuple of arrays; with `batch`, examples along their first axis.
        batch: int, examples of an update; `None`: all data, the same in each update.
        floor: float, the least value that the loss can have; what is recorded is the loss above it.
        error: function (model) -> float, relative L2 error of the solution; `None` where the
            problem has no exact one.
        convolutions: bool, whether the model has any.
    """

    make_model: typing.Callable
    loss: typing.Callable
    data: tuple
    batch: int | None = None
    floor: float = 0.0
    error: typing.Callable | None = None
    convolutions: bool = False


def multilayer_perceptron(widths, initializer="glorot_normal"):
    """tanh between the layers, the last one linear; glorot_normal as in Raissi et al. 2019."""
    model = keras.Sequential([keras.Input((widths[0],))])
    for width in widths[1:-1]:
        model.add(layers.Dense(width, "tanh", kernel_initializer=initializer))
    model.add(layers.Dense(widths[-1], kernel_initializer=initializer))
    return model


def autoencoder(batch=None):
    """Deep autoencoder of handwritten digits, after Hinton & Salakhutdinov 2006 and Martens 2010.

    Those use larger images and networks; the loss is theirs, the cross-entropy between pixels and
    logistic outputs, summed over an image. Pixels are not binary, so that it cannot fall below
    their own entropy.
    """
    pixels = (load_digits().data / 16).astype(np.float32)
    inner = pixels[(pixels > 0) & (pixels < 1)].astype(np.float64)
    entropy = -np.sum(inner * np.log(inner) + (1 - inner) * np.log1p(-inner)) / len(pixels)

    def loss(model, x):
        logits = model(x, training=True)
        entropies = tf.nn.sigmoid_cross_entropy_with_logits(labels=x, logits=logits)
        return tf.reduce_mean(tf.reduce_sum(entropies, axis=1))

    return Problem(
        make_model=lambda: multilayer_perceptron((64, 48, 32, 16, 8, 16, 32, 48, 64)),
        loss=loss,
        data=(pixels,),
        batch=batch,
        floor=float(entropy),
    )


def derivatives(model, points):
    """The network's value and its derivatives at some points, carried forward through the layers.

    Taylor-mode differentiation (Griewank & Walther 2008, "Evaluating Derivatives", chapter 13)
    costs one pass of a wider batch, where nested tapes would keep a graph for each order.

    Args:
        model: `keras.Sequential` of Dense layers, tanh or linear, with one output.
        points: tensor (n, inputs).

    Returns:
        Value (n, 1), list of the first derivatives by each input, and second derivative by the
        first input.
    """
    count, inputs = points.shape
    ones = tf.ones((count, 1))
    first = [ones * tf.one_hot([i], inputs) for i in range(inputs)]
    parts = [points, *first, tf.zeros_like(points)]
    for layer in model.layers:
        products = tf.concat(parts, axis=0) @ layer.kernel
        value, *first, second = tf.split(products, len(parts))
        value += layer.bias
        if layer.activation is keras.activations.tanh:
            value = tf.tanh(value)
            slope = 1 - value * value
            second = slope * (second - 2 * value * first[0] ** 2)
            first = [slope * x for x in first]
        parts = [value, *first, second]
    return value, first, second


def poisson_solution(x):
    """u, and f = u'', for the terms in `POISSON_TERMS`."""
    u = sum(a * np.sin(k * np.pi * x) for a, k in POISSON_TERMS)
    f = sum(-a * (k * np.pi) ** 2 * np.sin(k * np.pi * x) for a, k in POISSON_TERMS)
    return u, f


def poisson():
    """Physics-informed network for u'' = f on [-1, 1], u(-1) = u(1) = 0.

    Two frequencies in u, of which such networks learn the higher one last (Wang, Wang & Perdikaris
    2021, arXiv 2012.10047, has 2 and 50). The squared residual is divided by the mean of f^2, which
    brings it to the size of the boundary term.
    """
    x = np.linspace(-1, 1, 128)[:, None].astype(np.float32)
    f = poisson_solution(x)[1].astype(np.float32)
    boundary = np.array([[-1.0], [1.0]], np.float32)
    scale = float(np.mean(f**2))
    grid = np.linspace(-1, 1, 1001)[:, None]

    def loss(model, x, f, boundary):
        _, _, u_xx = derivatives(model, x)
        return tf.reduce_mean((u_xx - f) ** 2) / scale + tf.reduce_mean(model(boundary) ** 2)

    return Problem(
        make_model=lambda: multilayer_perceptron((1, 32, 32, 32, 1)),
        loss=loss,
        data=(x, f, boundary),
        error=lambda model: relative_error(model, grid, poisson_solution(grid)[0]),
    )


def burgers_solution(x, t, nodes=120):
    """The exact solution of u_t + u u_x = (0.01 / pi) u_xx with u(x, 0) = -sin(pi x), periodic.

    By the Cole-Hopf transformation (Basdevant et al. 1986, Computers & Fluids 14, 23-41), with
    Gauss-Hermite quadrature in float64:

        u = -int sin(pi y) F(y) exp(-eta^2 / 4 nu t) d eta / int F(y) exp(-eta^2 / 4 nu t) d eta
        F(y) = exp(-cos(pi y) / 2 pi nu),  y = x - eta

    Args:
        x, t: arrays that broadcast, t >= 0.
        nodes: int, of the quadrature.
    """
    x, t = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(t, np.float64))
    eta, weights = np.polynomial.hermite.hermgauss(nodes)
    y = x[..., None] - np.sqrt(4 * VISCOSITY * t)[..., None] * eta
    # Both integrals times exp(-1 / 2 pi nu), so that none becomes huge.
    kernel = weights * np.exp(-(1 + np.cos(np.pi * y)) / (2 * np.pi * VISCOSITY))
    return -(np.sin(np.pi * y) * kernel).sum(-1) / kernel.sum(-1)


def burgers_residual(model, points):
    """u_t + u u_x - (0.01 / pi) u_xx of the network at points (x, t)."""
    u, (u_x, u_t), u_xx = derivatives(model, points)
    return u_t + u * u_x - VISCOSITY * u_xx


def burgers():
    """Physics-informed network for Burgers' equation (Raissi et al. 2019, appendix A).

    Smaller than theirs: 1,000 collocation points, not 10,000, and 4 hidden layers of 20, not 8.
    """
    from scipy.stats import qmc

    rng = np.random.default_rng(0)
    interior = qmc.LatinHypercube(2, seed=0).random(1000) * [2, 1] + [-1, 0]
    start = np.stack([rng.uniform(-1, 1, 50), np.zeros(50)], axis=1)
    sides = np.stack([np.repeat([-1.0, 1.0], 25), rng.uniform(0, 1, 50)], axis=1)
    boundary = np.concatenate([start, sides])
    values = np.concatenate([-np.sin(np.pi * start[:, :1]), np.zeros((50, 1))])
    x, t = np.meshgrid(np.linspace(-1, 1, 201), np.linspace(0, 1, 51))
    grid = np.stack([x.ravel(), t.ravel()], axis=1)
    exact = burgers_solution(*grid.T)[:, None]

    def loss(model, interior, boundary, values):
        residual = tf.reduce_mean(burgers_residual(model, interior) ** 2)
        return residual + tf.reduce_mean((model(boundary) - values) ** 2)

    return Problem(
        make_model=lambda: multilayer_perceptron((2, 20, 20, 20, 20, 1)),
        loss=loss,
        data=tuple(a.astype(np.float32) for a in (interior, boundary, values)),
        error=lambda model: relative_error(model, grid, exact),
    )


def relative_error(model, points, exact):
    """||u - exact|| / ||exact|| in L2 over the points."""
    values = model(tf.constant(points, tf.float32)).numpy()
    return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))


def resnet_plain():
    """ResNet-8 without normalisation (He et al. 2016, 4.2, shortcuts B) on handwritten digits."""
    digits = load_digits()

    def convolution(x, filters, strides=1, size=3):
        initializer = "he_normal"
        layer = layers.Conv2D(filters, size, strides, "same", kernel_initializer=initializer)
        return layer(x)

    def make_model():
        images = keras.Input((8, 8, 1))
        x = layers.ReLU()(convolution(images, 8))
        for filters, strides in ((8, 1), (16, 2), (32, 2)):
            y = convolution(layers.ReLU()(convolution(x, filters, strides)), filters)
            if strides > 1:
                x = convolution(x, filters, strides, size=1)
            x = layers.ReLU()(layers.Add()([x, y]))
        return keras.Model(images, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))

    def loss(model, images, labels):
        logits = model(images, training=True)
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return tf.reduce_mean(entropy)

    return Problem(
        make_model=make_model,
        loss=loss,
        data=((digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)),
        batch=128,
        convolutions=True,
    )


def adding_data(examples, length, rng):
    """The adding problem (Hochreiter & Schmidhuber 1997, section 5.4, as in Le et al. 2015, 4.1).

    Returns:
        Sequences (examples, length, 2) of a number in [0, 1] and a mark, which is 1 at one place
        of each half and 0 elsewhere; and the sums (examples, 1) of the two marked numbers.
    """
    numbers = rng.uniform(size=(examples, length))
    rows, half = np.arange(examples), length // 2
    marks = np.zeros((examples, length))
    marks[rows, rng.integers(0, half, examples)] = 1
    marks[rows, rng.integers(half, length, examples)] = 1
    sums = np.sum(numbers * marks, axis=1, keepdims=True)
    return np.stack([numbers, marks], axis=-1).astype(np.float32), sums.astype(np.float32)


def adding():
    """A plain recurrent network (tanh) on the adding problem; always saying 1 has a loss of 1/6."""
    length = 50

    def make_model():
        sequences = keras.Input((length, 2))
        # Unrolled, it costs half the time of a loop.
        return keras.Model(sequences, layers.Dense(1)(layers.SimpleRNN(32, unroll=True)(sequences)))

    return Problem(
        make_model=make_model,
        loss=lambda model, x, y: tf.reduce_mean((model(x, training=True) - y) ** 2),
        data=adding_data(2000, length, np.random.default_rng(0)),
        batch=100,
    )


PROBLEMS = {
    "autoencoder": autoencoder,
    "autoencoder_256": lambda: autoencoder(batch=256),
    "poisson": poisson,
    "burgers": burgers,
    "resnet_plain": resnet_plain,
    "adding": adding,
}
