"""SGD with momentum as TensorFlow 1 and PyTorch define it."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="nlcg_tf")
class Momentum(keras.optimizers.Optimizer):
    """SGD with momentum whose velocity is a sum of gradients, not of steps.

    For a variable w with gradient g, learning rate gamma and momentum mu, as TensorFlow 1's
    `MomentumOptimizer`:

        v <- mu v + g
        w <- w - gamma v                    (Nesterov: w <- w - gamma (g + mu v))

    Keras' `SGD` has gamma inside the velocity: v <- mu v - gamma g, w <- w + v. Both are the same
    while gamma is constant. Where a schedule lowers it, this one's step shrinks at once, that of
    Keras over the next 1 / (1 - mu) updates.

    Args:
        learning_rate: float or `LearningRateSchedule`, gamma.
        momentum: float in [0, 1), mu.
        nesterov: bool.

    Raises:
        ValueError: for a momentum outside this range.
    """

    def __init__(self, learning_rate=0.01, momentum=0.9, nesterov=False, name="momentum", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is out of range. Received: momentum={momentum!r}")
        self.momentum = momentum
        self.nesterov = nesterov

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        gradient = ops.cast(gradient, variable.dtype)
        velocity = self._velocities[self._get_variable_index(variable)]
        self.assign(velocity, self.momentum * velocity + gradient)
        step = gradient + self.momentum * velocity if self.nesterov else velocity
        self.assign_sub(variable, ops.cast(learning_rate, variable.dtype) * step)

    def get_config(self):
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
        }
