"""Several workers, each a process of this program."""

import keras
import numpy as np
from sklearn.datasets import load_digits

import nlcg_tf
import nlcg_tf.horovod as hvd

hvd.init()
keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x, held_out = x / 16, np.arange(len(x)) % 5 == 0
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
)
model.compile(
    optimizer=hvd.DistributedOptimizer(nlcg_tf.NLCG(learning_rate=0.1)),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # Horovod has no XLA kernels
)
callbacks = [
    hvd.WatchWorkers(),  # refuses unequal numbers of steps, names a worker that hangs
    hvd.BroadcastVariables(),  # all start alike
    hvd.SumMetrics(),  # logs over all workers' examples
    hvd.AverageMovingStatistics(),  # of batch norm
    hvd.CheckIdentical(),  # raises where workers drift apart
]
# Each worker trains on its own part, with the same number of steps on all.
mine = np.flatnonzero(~held_out)
mine = mine[: len(mine) // hvd.size() * hvd.size()][hvd.rank() :: hvd.size()]
verbose = 2 if hvd.rank() == 0 else 0
model.fit(x[mine], y[mine], batch_size=128, epochs=15, callbacks=callbacks, verbose=verbose)
_, accuracy = model.evaluate(x[held_out], y[held_out], verbose=0)
if hvd.rank() == 0:
    print(f"{hvd.size()} workers, accuracy on held-out digits: {accuracy:.3f}")
