"""Imports TensorFlow quietly and quickly: what the programs import before anything else."""

import gc
import os

# TensorFlow's C++ start-up notices would hide the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Its import makes a million objects that last. Looking through them for garbage, again and again
# and once more at the end, would take a third of a start.
if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    gc.disable()
    import tensorflow  # noqa: F401

    gc.freeze()
    gc.enable()
