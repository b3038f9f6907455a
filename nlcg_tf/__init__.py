"""Preconditioned Nonlinear Conjugate Gradient (NLCG) for Keras 3 and TensorFlow.

>>> model.compile(optimizer=nlcg_tf.NLCG(learning_rate=0.1), loss="mse")

`nlcg_tf.horovod`, the layer for several workers, is imported on its own, since it needs Horovod.
"""

from nlcg_tf import callbacks, line_search, preconditioner, schedules
from nlcg_tf.optimizer import NLCG

__version__ = "0.1.0"

__all__ = ["NLCG", "callbacks", "line_search", "preconditioner", "schedules"]
