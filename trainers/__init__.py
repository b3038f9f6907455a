"""Training programs: `python -m trainers.cifar --help`."""

import os

# TensorFlow's C++ start-up notices would hide the one line that matters.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
