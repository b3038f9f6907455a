"""A quick import of TensorFlow."""

import gc
import os
import sys

# Packages for which Keras and TensorFlow Lite look, and for which the programs have no use, or only
# later: a third of an import.
OPTIONAL = ("jax", "matplotlib", "pandas", "sklearn")


def import_tensorflow(without=OPTIONAL):
    """Imports TensorFlow and Keras, with oneDNN, while some packages cannot be found.

    TensorFlow leaves oneDNN out on CPUs without AVX512-VNNI, such as many of AMD's. On one of them
    the gradient of ResNet-8 takes half the time with it, and that of ResNet-50 a third.

    An import makes a million objects that last. Looking through them for garbage, again and again
    and once more at the end, would take another third.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    hidden = [name for name in without if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # with None there, Python finds no such package
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()
    for name in hidden:
        sys.modules.pop(name)
