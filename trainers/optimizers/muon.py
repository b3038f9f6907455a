"""Muon for networks with convolutions."""

import keras
from keras import ops

from nlcg_tf.polar import matrix_shape, polar_factors
from nlcg_tf.reductions import norm


@keras.saving.register_keras_serializable(package="nlcg_tf")
class Muon(keras.optimizers.Optimizer):
    """Orthogonalised momentum for kernels, Adam for vectors (Jordan et al. 2024).

    A variable of two or more dimensions with gradient G is a matrix, all dimensions but the last
    its rows; for learning rate gamma and momentum mu:

        V <- mu V + G
        W <- W - gamma c polar(G + mu V)

    with c = 0.2 sqrt(max(rows, columns)), so that a step's root mean square is 0.2 gamma, near
    that of Adam (Liu et al. 2025, arXiv 2502.16982), or with c that makes a step gamma ||W|| long.
    Keras' own Muon treats two-dimensional variables alone.

    Args:
        learning_rate: float or `LearningRateSchedule`, gamma, for all variables.
        momentum: float in [0, 1), mu.
        length: `"shape"` or `"norm"`: what c is made of.

    Raises:
        ValueError: for an argument outside these.
    """

    def __init__(self, learning_rate=0.02, momentum=0.95, length="shape", name="muon", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is out of range. Received: momentum={momentum!r}")
        if length not in ("shape", "norm"):
            raise ValueError(f"`length` must be 'shape' or 'norm'. Received: length={length!r}")
        self.momentum = momentum
        self.length = length

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._first = self.add_optimizer_variables(variables, "momentum")
        self._second = [
            None if len(v.shape) > 1 else self.add_variable_from_reference(v, "velocity")
            for v in variables
        ]

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        indices = [self._get_variable_index(v) for v in trainable_variables]
        entries = list(zip(indices, grads, trainable_variables))
        kernels = [e for e in entries if len(e[2].shape) > 1]
        sums = []
        for i, g, _ in kernels:
            v = self.momentum * self._first[i] + g
            self._first[i].assign(v)
            sums.append(g + self.momentum * v)
        matrices = [ops.reshape(x, matrix_shape(x.shape)) for x in sums]
        for (_, _, w), factor in zip(kernels, polar_factors(matrices)):
            length = 0.2 * max(factor.shape) ** 0.5
            if self.length == "norm":
                length = norm(ops.convert_to_tensor(w)) / ops.maximum(norm(factor), 1e-30)
            w.assign_sub(learning_rate * length * ops.reshape(factor, w.shape))
        step = ops.cast(self._iterations + 1, learning_rate.dtype)
        for i, g, w in entries:
            if self._second[i] is not None:
                self._adam(i, g, w, learning_rate, step)

    def _adam(self, i, g, w, learning_rate, step):
        first = 0.9 * self._first[i] + 0.1 * g
        second = 0.999 * self._second[i] + 0.001 * g * g
        self._first[i].assign(first)
        self._second[i].assign(second)
        corrected = first / (1 - 0.9**step), second / (1 - 0.999**step)
        w.assign_sub(learning_rate * corrected[0] / (ops.sqrt(corrected[1]) + 1e-8))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "length": self.length}
