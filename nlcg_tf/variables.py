"""Lists of variables, and of their gradients, as they come from a caller."""

import keras
import numpy as np


def plain(variables):
    """On TensorFlow its variables behind Keras' ones, as Keras' own optimizers take them.

    Keras excludes variables from weight decay by their names, which contain names of layers.
    """
    if keras.backend.backend() != "tensorflow":
        return list(variables)
    return [v.value if isinstance(v, keras.Variable) else v for v in variables]


def check_distinct(variables):
    """Raises a ValueError for a list in which a variable stands twice."""
    seen = set()
    for v, known in zip(variables, plain(variables)):
        if id(known) in seen:
            raise ValueError(
                f"Variable '{getattr(v, 'path', v.name)}' is given twice. The gradient of a weight "
                "that is used in several places is one sum: give the variable once"
            )
        seen.add(id(known))


def check_gradients(grads, variables):
    """Raises a ValueError for a gradient that is not of its variable's shape, or is complex."""
    if len(grads) != len(variables):
        raise ValueError(f"Received {len(grads)} gradients of {len(variables)} variables")
    for g, v in zip(grads, variables):
        dtype = keras.backend.standardize_dtype(g.dtype)
        if "complex" in dtype or not has_shape(g, v.shape):
            raise ValueError(
                f"The gradient of variable '{getattr(v, 'path', v.name)}' must have the shape "
                f"{tuple(v.shape)} and real numbers. Received: shape={g.shape}, dtype={dtype}"
            )


def has_shape(x, shape):
    """Whether a tensor, or what can be made one, has this shape, as far as a graph knows that."""
    known = known_shape(x)
    return known is None or known == tuple(shape)


def known_shape(x):
    """The shape of a tensor, or of what can be made one; `None` where a graph does not know all."""
    shape = x.shape if hasattr(x, "shape") else np.shape(x)
    if getattr(shape, "rank", 0) is None or None in tuple(shape):
        return None
    return tuple(shape)
