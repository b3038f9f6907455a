"""The optimizers of the paper's comparison, under one schedule."""

import keras

import nlcg_tf

NAMES = ("nlcg", "momentum", "nesterov", "rmsprop", "sgd", "adam")


def make_optimizer(name, schedule, **nlcg_arguments):
    """Makes an optimizer with the paper's settings.

    Args:
        name: one of `NAMES`. RMSProp has decay 0.9, momentum 0.9 and epsilon 1.0.
        schedule: float or `LearningRateSchedule`.
        **nlcg_arguments: for `nlcg_tf.NLCG`; other optimizers do not look at them.

    Raises:
        ValueError: for another name.
    """
    optimizers = keras.optimizers
    if name == "nlcg":
        return nlcg_tf.NLCG(schedule, **nlcg_arguments)
    if name == "momentum":
        return optimizers.SGD(schedule, momentum=0.9)
    if name == "nesterov":
        return optimizers.SGD(schedule, momentum=0.9, nesterov=True)
    if name == "rmsprop":
        return optimizers.RMSprop(schedule, rho=0.9, momentum=0.9, epsilon=1.0)
    if name == "sgd":
        return optimizers.SGD(schedule)
    if name == "adam":
        return optimizers.Adam(schedule)
    raise ValueError(f"`name` must be one of {', '.join(NAMES)}. Received: name={name!r}")
