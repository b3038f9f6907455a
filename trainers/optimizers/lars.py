"""LARS: You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks"."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="nlcg_tf")
class LARS(keras.optimizers.Optimizer):
    """SGD with momentum and a rate for each layer (arXiv 1708.03888, Algorithm 1).

    For a kernel w with gradient g, learning rate gamma, momentum m, weight decay beta and trust
    coefficient eta:

        lambda = eta ||w|| / (||g|| + beta ||w||)
        v <- m v + gamma lambda (g + beta w)
        w <- w - v

    Vectors (biases, scales and offsets of batch norm) have lambda = 1 and no weight decay, as in
    the LARS of the MLPerf benchmarks: from their initial zero they would otherwise never move.
    So has a kernel with ||w|| = 0 or ||g|| = 0 lambda = 1.

    Args:
        learning_rate: float or `LearningRateSchedule`, gamma.
        momentum: float in [0, 1), m.
        trust_coefficient: float > 0, eta.
        l2: float >= 0, beta. Keras' own `weight_decay` is decoupled and not scaled by lambda.

    Raises:
        ValueError: for an argument outside these ranges.
    """

    def __init__(
        self,
        learning_rate=0.1,
        momentum=0.9,
        trust_coefficient=0.001,
        l2=0.0,
        name="lars",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        for argument, value, fits in (
            ("momentum", momentum, 0 <= momentum < 1),
            ("trust_coefficient", trust_coefficient, trust_coefficient > 0),
            ("l2", l2, l2 >= 0),
        ):
            if not fits:
                raise ValueError(f"`{argument}` is out of range. Received: {argument}={value!r}")
        self.momentum = momentum
        self.trust_coefficient = trust_coefficient
        self.l2 = l2

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        gradient = ops.cast(gradient, variable.dtype)
        if len(variable.shape) > 1:
            norm, gradient_norm = (ops.sqrt(ops.sum(x * x)) for x in (variable, gradient))
            ratio = self.trust_coefficient * norm / (gradient_norm + self.l2 * norm)
            trust = ops.where((norm > 0) & (gradient_norm > 0), ratio, 1.0)
            gradient = trust * (gradient + self.l2 * variable)
        velocity = self._velocities[self._get_variable_index(variable)]
        step = ops.cast(learning_rate, variable.dtype) * gradient
        self.assign(velocity, self.momentum * velocity + step)
        self.assign_sub(variable, velocity)

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "trust_coefficient": self.trust_coefficient,
            "l2": self.l2,
        }
