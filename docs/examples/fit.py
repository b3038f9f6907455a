"""Keras' `fit` on handwritten digits."""

import keras
import numpy as np
from sklearn.datasets import load_digits

import nlcg_tf

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x, held_out = x / 16, np.arange(len(x)) % 5 == 0
model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
)
model.compile(
    optimizer=nlcg_tf.NLCG(learning_rate=0.1),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=False,  # for the fused op: on a GPU Keras would choose XLA
)
diagnostics = nlcg_tf.callbacks.OptimizerDiagnostics()
model.fit(x[~held_out], y[~held_out], batch_size=512, epochs=20, callbacks=[diagnostics], verbose=2)
_, accuracy = model.evaluate(x[held_out], y[held_out], verbose=0)
print(f"accuracy on held-out digits: {accuracy:.3f}")
