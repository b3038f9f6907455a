"""The optimizers of the paper's comparison, under one schedule."""

import keras

import nlcg_tf
from trainers.lars import LARS
from trainers.momentum import Momentum

NAMES = ("nlcg", "momentum", "nesterov", "momentum_tf1", "nesterov_tf1")
NAMES += ("rmsprop", "sgd", "adam", "adamw", "lamb", "lars")
# Those whose weights decay apart from the loss.
DECAYING = ("adamw", "lamb", "lars")


def make_optimizer(name, schedule, weight_decay=0.0, lars_coefficient=None, **nlcg_arguments):
    """Makes an optimizer with the paper's settings.

    Args:
        name: one of `NAMES`. RMSProp has decay 0.9, momentum 0.9 and epsilon 1.0. Momentum is that
            of Keras, "_tf1" that of TensorFlow 1, most likely the paper's. AdamW and Lamb take
            Keras' default decay for AdamW, 0.004 of each weight times the rate.
        schedule: float or `LearningRateSchedule`.
        weight_decay: float, factor of sum(w^2) for LARS, which must see it apart from the gradient;
            for those not in `DECAYING` it is in the model's loss.
        lars_coefficient: float for LARS (0.001 by default) and NLCG (no scaling by default).
        **nlcg_arguments: for `nlcg_tf.NLCG`; other optimizers do not look at them.

    Raises:
        ValueError: for another name.
    """
    optimizers = keras.optimizers
    if name == "nlcg":
        return nlcg_tf.NLCG(schedule, lars_coefficient=lars_coefficient, **nlcg_arguments)
    if name == "momentum":
        return optimizers.SGD(schedule, momentum=0.9)
    if name == "nesterov":
        return optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    if name in ("momentum_tf1", "nesterov_tf1"):
        return Momentum(schedule, nesterov=name == "nesterov_tf1")
    if name == "rmsprop":
        return optimizers.RMSprop(schedule, rho=0.9, momentum=0.9, epsilon=1.0)
    if name == "sgd":
        return optimizers.SGD(schedule)
    if name == "adam":
        return optimizers.Adam(schedule)
    if name == "adamw":
        return optimizers.AdamW(schedule, weight_decay=0.004)
    if name == "lamb":
        return optimizers.Lamb(schedule, weight_decay=0.004)
    if name == "lars":
        return LARS(schedule, trust_coefficient=lars_coefficient or 0.001, l2=2 * weight_decay)
    raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: name={name!r}")
