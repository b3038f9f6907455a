"""Small problems and helpers that several test files share."""

import keras
import numpy as np
import tensorflow as tf

from nlcg_tf import NLCG
from nlcg_tf.preconditioner import Preconditioner
from tests.support.oracle import Oracle

RULES = ("fletcher_reeves", "polak_ribiere", "blended")
PRECONDITIONERS = ("bfgs", "normalized_bfgs", None)
LINE_SEARCHES = ("online", "step", None)
DEFAULT = ("blended", "normalized_bfgs", None, True)
SHAPES = [(3, 4), (5,), (), (7, 2, 2), (1, 2400)]


@keras.saving.register_keras_serializable(package="tests")
class MeanSquares(Preconditioner):
    """One of a user's own, as RMSProp's; its state has the name of a slot of the fused op."""

    def initial_state(self, shape):
        return {"hessian_diagonal": (shape, 0.0)}

    def update(self, state, g, w, y, s, gain_ratio, sums):
        old = state["hessian_diagonal"]
        return {"hessian_diagonal": [v + 0.1 * (x * x - v) for x, v in zip(g, old)]}, True

    def apply(self, state, g, w, epsilon, sums):
        roots = [keras.ops.sqrt(v) + epsilon for v in state["hessian_diagonal"]]
        return [x / root for x, root in zip(g, roots)], keras.ops.ones((), g[0].dtype)


def flat(arrays):
    return np.concatenate([np.ravel(np.asarray(a)) for a in arrays]).astype(np.float64)


def paper_nlcg(
    learning_rate=0.1,
    update_rule="fletcher_reeves",
    preconditioner="bfgs",
    line_search="online",
    **arguments,
):
    """NLCG as published, where other settings are not given."""
    arguments = {"nesterov": False, **arguments}
    return NLCG(learning_rate, update_rule, preconditioner, line_search, **arguments)


def make_oracle(optimizer, weights, **arguments):
    """An oracle with the settings of an NLCG optimizer, starting from `weights`."""
    names = {"OnlineLineSearch": "online", "StepLineSearch": "step", "NoneType": None}
    names |= {"DiagonalBFGS": "bfgs", "NormalizedBFGS": "normalized_bfgs", "NoneType": None}
    return Oracle(
        flat(weights),
        [np.size(w) for w in weights],
        optimizer.update_rule,
        names[type(optimizer.preconditioner).__name__],
        names[type(optimizer.line_search).__name__],
        lars=optimizer.lars_coefficient,
        nesterov=optimizer.nesterov,
        momentum=optimizer.momentum,
        decay=getattr(optimizer.preconditioner, "decay", None),
        **arguments,
    )


def relative_difference(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def regression_model(seed=1, dtype=None, units=6, **layer_arguments):
    """A small network whose layers differ in shape; the same weights for the same seed."""
    initializers = [keras.initializers.GlorotNormal(seed=seed + i) for i in range(2)]
    return keras.Sequential(
        [
            keras.Input((4,), dtype=dtype),
            keras.layers.Dense(
                units, "tanh", kernel_initializer=initializers[0], dtype=dtype, **layer_arguments
            ),
            keras.layers.Dense(1, kernel_initializer=initializers[1], dtype=dtype),
        ]
    )


def regression_data(examples=64, dtype="float32"):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(examples, 4))
    y = np.sin(x[:, :1]) + 0.5 * x[:, 1:2] + 0.1 * rng.normal(size=(examples, 1))
    return x.astype(dtype), y.astype(dtype)


def digits_model(dtype=None):
    """A small network without batch norm for `digits_data`."""
    initializers = [keras.initializers.GlorotNormal(seed=i) for i in range(2)]
    return keras.Sequential(
        [
            keras.Input((64,), dtype=dtype),
            keras.layers.Dense(32, "tanh", kernel_initializer=initializers[0], dtype=dtype),
            keras.layers.Dense(10, kernel_initializer=initializers[1], dtype=dtype),
        ]
    )


def digits_data(examples, dtype="float32"):
    """Handwritten digits with pixels in [0, 1], and their one-hot labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:examples] / 16).astype(dtype), np.eye(10, dtype=dtype)[y[:examples]]


class FollowGradients:
    """Runs the oracle beside a model: gradients from the model's weights, update by the oracle.

    The reference for every way of training: at each update the oracle is given the gradient and
    the loss at its own weights, computed in eager TensorFlow, apart from the optimizer under test.
    """

    def __init__(self, model, optimizer, **arguments):
        self.model = keras.models.clone_model(model)
        self.model.set_weights(model.get_weights())
        self.oracle = make_oracle(optimizer, [v.numpy() for v in self.variables], **arguments)

    @property
    def variables(self):
        return self.model.trainable_variables

    def update(self, x, y, learning_rate, transform=lambda g: g, **arguments):
        self._assign(self.oracle.w)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.model(x, training=True) - y))
            loss += tf.add_n(self.model.losses) if self.model.losses else 0
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(loss, self.variables)]
        self.oracle.update(transform(flat(gradients)), float(loss), learning_rate, **arguments)
        self._assign(self.oracle.w)

    def _assign(self, w):
        start = 0
        for v in self.variables:
            size = int(np.prod(v.shape))
            v.assign(w[start : start + size].reshape(v.shape))
            start += size
