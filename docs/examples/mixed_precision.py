"""Computation in float16, with loss scaling."""

import keras
import numpy as np
from sklearn.datasets import load_digits

import nlcg_tf

keras.utils.set_random_seed(0)
keras.mixed_precision.set_global_policy("mixed_float16")
x, y = load_digits(return_X_y=True)
x, held_out = (x / 16).reshape(-1, 8, 8, 1), np.arange(len(x)) % 5 == 0
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10, dtype="float32"),  # logits in full precision
    ]
)
# `fit` wraps the optimizer in Keras' LossScaleOptimizer by itself.
model.compile(
    optimizer=nlcg_tf.NLCG(learning_rate=0.1),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # for the fused op: on a GPU Keras would choose XLA
)
model.fit(x[~held_out], y[~held_out], batch_size=256, epochs=10, verbose=2)
_, accuracy = model.evaluate(x[held_out], y[held_out], verbose=0)
skipped = model.optimizer.inner_optimizer.diagnostics()["skipped_updates"]
print(f"accuracy on held-out digits: {accuracy:.3f} ({skipped:.0f} updates skipped by NLCG)")
