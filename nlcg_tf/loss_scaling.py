"""Lets NLCG see the loss where another optimizer has it inside.

`fit` tells the loss to the outermost optimizer's `scale_loss` alone: under `mixed_float16` that of
Keras' `LossScaleOptimizer`, or that of `MultiOptimizer`, or of a wrapper of the user's own. Each
class's `scale_loss` is therefore replaced by one that does what it always did, and then tells the
loss to all optimizers inside that have `observe_loss`.
"""

import threading
import weakref
from collections.abc import Mapping

import keras

# Of this thread: the optimizer whose `scale_loss` came last before it was built, by a weak
# reference, the loss, and who has taken it. `MultiOptimizer` may find the optimizers inside of it
# only when it is built.
_before_build = threading.local()


def tell_inner_optimizers():
    """Sees to it that optimizers inside of others are told the loss; may be called again."""
    base = next(c for c in keras.optimizers.Optimizer.__mro__ if "scale_loss" in vars(c))
    classes = [base]
    for cls in classes:
        classes += cls.__subclasses__()
        original = vars(cls).get("scale_loss")
        if original is not None and not hasattr(original, "tells_inner_optimizers"):
            cls.scale_loss = _telling(original)


def _telling(original):
    # Not functools.wraps, behind which TensorFlow's autograph looks for the original.
    def scale_loss(self, loss):
        scaled = original(self, loss)
        if not hasattr(self, "observe_loss"):
            # Last: a wrapper may have told them a loss that it had scaled.
            for optimizer in inner_optimizers(self):
                if hasattr(optimizer, "observe_loss"):
                    optimizer.observe_loss(loss)
            if not self.built:
                vars(_before_build).update(outer=weakref.ref(self), loss=loss, taken=[])
        return scaled

    scale_loss.tells_inner_optimizers = True
    return scale_loss


def take_loss_before_build(optimizer):
    """The loss that an outer optimizer was told before it found this one; otherwise `None`."""
    outer = getattr(_before_build, "outer", lambda: None)()
    if outer is None or optimizer not in inner_optimizers(outer):
        return None
    if optimizer in _before_build.taken:
        return None
    _before_build.taken.append(optimizer)
    return _before_build.loss


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
