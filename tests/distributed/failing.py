"""A worker that fails or hangs in the third step; run by test_failures.py under horovodrun."""

import trainers.quick_start  # noqa: F401, I001

import os
import signal
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf.horovod as hvd

how, who = sys.argv[1], int(sys.argv[2])
hvd.init()
print(f"began at {time.time()}", flush=True)  # imports take what the machine gives them


class StopsAlone(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = hvd.rank() == who


keras.utils.set_random_seed(0)
if how in ("validates alone", "stops alone"):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    data = np.ones((32, 1)), np.ones((32, 1))
    callbacks = [hvd.WatchWorkers(seconds=2), hvd.SumMetrics(), hvd.CheckIdentical()]
    validates = how == "validates alone" and hvd.rank() == who
    if how == "stops alone":
        callbacks.append(StopsAlone())
    validation = data if validates else None
    model.fit(*data, 8, 3, callbacks=callbacks, validation_data=validation, verbose=0)
    sys.exit()
if how == "fits less":
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD())
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    steps = 2 if hvd.rank() == who else 3
    # Nobody can know how many there are.
    data = tf.data.Dataset.from_generator(
        lambda: ((np.ones((4, 1)), np.ones((4, 1))) for _ in range(steps)),
        output_signature=(tf.TensorSpec((4, 1)), tf.TensorSpec((4, 1))),
    )
    model.fit(data, callbacks=[hvd.WatchWorkers(seconds=2)], verbose=0)
    sys.exit()
with hvd.Watch(seconds=3) as watch:
    for step in range(5):
        if step == 2 and hvd.rank() == who:
            if how == "raises":
                raise ValueError("this worker's own error")
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "is busy":
                time.sleep(8)
            if how == "is frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
        watch.tick()
        hvd.sum_over_workers([step])
