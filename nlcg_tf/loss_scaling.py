"""Lets NLCG see the loss when Keras scales it.

Under `mixed_float16` Keras wraps the optimizer in `LossScaleOptimizer`, whose `scale_loss` never
calls that of the optimizer inside. It is therefore replaced by one which first tells the loss to an
inner optimizer that has `observe_loss`, and then does what it always did.
"""

import functools

from keras.optimizers import LossScaleOptimizer


def forward_loss_to_inner_optimizer():
    original = LossScaleOptimizer.scale_loss
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def scale_loss(self, loss):
        observe_loss = getattr(self.inner_optimizer, "observe_loss", None)
        if observe_loss is not None:
            observe_loss(loss)
        return original(self, loss)

    LossScaleOptimizer.scale_loss = scale_loss
