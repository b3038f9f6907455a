"""The moving average of the weights, which is tested beside the weights themselves."""

from keras import ops

DECAY = 0.9999


def decay(updates):
    """The share of the average that an update keeps: small at first, to forget the initial weights.

    Args:
        updates: scalar tensor, the updates before this one.
    """
    n = ops.cast(updates, "float32")
    return ops.minimum(DECAY, (1 + n) / (10 + n))
