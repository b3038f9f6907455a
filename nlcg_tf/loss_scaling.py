"""Lets NLCG see the loss where another optimizer has it inside.

`fit` tells the loss to the outermost optimizer's `scale_loss` alone: under `mixed_float16` that of
Keras' `LossScaleOptimizer`, or that of `MultiOptimizer`, or of a wrapper of the user's own. Each
class's `scale_loss` is therefore replaced by one that does what it always did, and then tells the
loss to all optimizers inside that have `observe_loss`. `MultiOptimizer` may find those only when it
is built, so its `build` tells them too.
"""

from collections.abc import Mapping

import keras

MultiOptimizer = getattr(keras.optimizers, "MultiOptimizer", ())  # Keras 3.8 has none


def tell_inner_optimizers():
    """Sees to it that optimizers inside of others are told the loss; may be called again."""
    base = next(c for c in keras.optimizers.Optimizer.__mro__ if "scale_loss" in vars(c))
    classes = [base]
    for cls in classes:
        classes += cls.__subclasses__()
        original = vars(cls).get("scale_loss")
        if original is not None and not hasattr(original, "tells_inner_optimizers"):
            cls.scale_loss = _telling(original)
    if MultiOptimizer and not hasattr(MultiOptimizer.build, "tells_inner_optimizers"):
        MultiOptimizer.build = _telling_when_built(MultiOptimizer.build)


def _telling(original):
    # Not functools.wraps, behind which TensorFlow's autograph looks for the original.
    def scale_loss(self, loss):
        scaled = original(self, loss)
        if not hasattr(self, "observe_loss"):
            # Last: a wrapper may have told them a loss that it had scaled.
            for optimizer in (self, *inner_optimizers(self)):
                if hasattr(optimizer, "observe_loss"):
                    optimizer.observe_loss(loss)
                elif isinstance(optimizer, MultiOptimizer) and not optimizer.built:
                    vars(optimizer)["loss_before_build"] = loss
        return scaled

    scale_loss.tells_inner_optimizers = True
    return scale_loss


def _telling_when_built(original):
    def build(self, var_list):
        original(self, var_list)
        loss = vars(self).pop("loss_before_build", None)
        for optimizer in inner_optimizers(self):
            if loss is not None and hasattr(optimizer, "observe_loss"):
                optimizer.observe_loss(loss)

    build.tells_inner_optimizers = True
    return build


def inner_optimizers(optimizer):
    """The optimizers that another holds, alone or in lists and dicts, and what these hold."""
    found, seen, waiting = [], {id(optimizer)}, [vars(optimizer)]
    for value in waiting:
        if isinstance(value, keras.optimizers.Optimizer):
            found.append(value)
            inner = vars(value).values()
        elif isinstance(value, Mapping):
            inner = value.values()
        else:
            inner = value if isinstance(value, (list, tuple)) else ()
        waiting += [x for x in inner if id(x) not in seen and not seen.add(id(x))]
    return found
