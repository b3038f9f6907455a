"""Keras 3 on Horovod: the layer that Horovod's own Keras module no longer provides.

Horovod's `DistributedOptimizer` and callbacks call methods that Keras 3 removed, so its workers
would train apart without an error. Here only Horovod's low-level operations are used.
"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "nlcg_tf.horovod works on the TensorFlow backend of Keras alone. "
        f"Received: KERAS_BACKEND={keras.backend.backend()}"
    )
try:
    from horovod.tensorflow import init, local_rank, local_size, rank, shutdown, size
except ImportError as error:
    raise ImportError(
        "nlcg_tf.horovod needs Horovod built for this TensorFlow "
        f"(scripts/setup.sh builds it). The import failed with: {error}"
    ) from error

from nlcg_tf.horovod.callbacks import (
    AverageMovingStatistics,
    BroadcastVariables,
    CheckIdentical,
    SumMetrics,
    WatchWorkers,
)
from nlcg_tf.horovod.collectives import (
    allgather_object,
    average_moving_statistics,
    broadcast,
    broadcast_object,
    check_identical,
    sum_metrics,
    sum_over_workers,
)
from nlcg_tf.horovod.elastic import ElasticState, elastic_run
from nlcg_tf.horovod.optimizer import DistributedOptimizer
from nlcg_tf.horovod.watch import Watch
from nlcg_tf.horovod.whole import gather_optimizer, gathered, scatter_optimizer, whole_optimizer

__all__ = [
    "AverageMovingStatistics",
    "BroadcastVariables",
    "CheckIdentical",
    "DistributedOptimizer",
    "ElasticState",
    "SumMetrics",
    "Watch",
    "WatchWorkers",
    "allgather_object",
    "average_moving_statistics",
    "broadcast",
    "broadcast_object",
    "check_identical",
    "elastic_run",
    "gather_optimizer",
    "gathered",
    "init",
    "local_rank",
    "local_size",
    "rank",
    "scatter_optimizer",
    "shutdown",
    "size",
    "sum_metrics",
    "sum_over_workers",
    "whole_optimizer",
]
