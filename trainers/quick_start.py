"""Imports TensorFlow quietly and quickly: what the programs import before anything else."""

import os
import sys

from trainers.engine import preemption
from trainers.engine.imports import OPTIONAL, import_tensorflow

program = getattr(sys.modules["__main__"].__spec__, "name", None)
if program in ("trainers.cifar", "trainers.imagenet"):
    preemption.watch()  # a machine may be taken back while TensorFlow is being imported

# A terminal that is not for Unicode shows \xe9, and ends nothing.
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # none where it is closed, another thing in a notebook
        stream.reconfigure(errors="backslashreplace")

is_program = (program or "").startswith(("trainers.", "tests."))
if is_program:
    # Figures go to files; a notebook's own backend is not for other processes.
    os.environ["MPLBACKEND"] = "Agg"

# TensorFlow's C++ start-up notices would hide the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    # A notebook that imports this may use Keras' figures.
    import_tensorflow(OPTIONAL if is_program else ())
