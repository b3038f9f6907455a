"""Imports TensorFlow quietly and quickly: what the programs import before anything else."""

import gc
import os
import sys

from trainers.engine import preemption

program = getattr(sys.modules["__main__"].__spec__, "name", None)
if program in ("trainers.cifar", "trainers.imagenet"):
    preemption.watch()  # a machine may be taken back while TensorFlow is being imported

# A terminal that is not for Unicode shows \xe9, and ends nothing.
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # none where it is closed, another thing in a notebook
        stream.reconfigure(errors="backslashreplace")

if (program or "").startswith("trainers."):
    # Figures go to files; a notebook's own backend is not for other processes.
    os.environ["MPLBACKEND"] = "Agg"

# TensorFlow's C++ start-up notices would hide the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Its import makes a million objects that last. Looking through them for garbage, again and again
# and once more at the end, would take a third of a start. Another third is packages for which Keras
# and TensorFlow Lite look, and for which the programs have no use, or only later.
OPTIONAL = ("jax", "matplotlib", "pandas", "sklearn")

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    hidden = []
    if (program or "").startswith("trainers."):
        hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # with None there, Python finds no such package
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()
    for name in hidden:
        sys.modules.pop(name)
