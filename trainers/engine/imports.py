"""A quick import of TensorFlow."""

import gc
import sys

# Packages for which Keras and TensorFlow Lite look, and for which the programs have no use, or only
# later: a third of an import.
OPTIONAL = ("jax", "matplotlib", "pandas", "sklearn")


def import_tensorflow(without=OPTIONAL):
    """Imports TensorFlow and Keras, while some packages cannot be found.

    It makes a million objects that last. Looking through them for garbage, again and again and once
    more at the end, would take another third.
    """
    hidden = [name for name in without if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # with None there, Python finds no such package
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()
    for name in hidden:
        sys.modules.pop(name)
