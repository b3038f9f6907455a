"""NLCG on two devices of JAX, of which each takes half of every batch."""

import os

os.environ["KERAS_BACKEND"] = "jax"
# Two devices on a machine without any; leave this out where there are GPUs or TPUs.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
from keras import distribution
from sklearn.datasets import load_digits

import nlcg_tf

devices = distribution.list_devices()
distribution.set_distribution(distribution.DataParallel(devices=devices))

x, y = (part[:1792] for part in load_digits(return_X_y=True))  # batches that divide evenly
hidden = keras.layers.Dense(64, "relu", name="hidden")
model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
model.compile(
    optimizer=nlcg_tf.NLCG(learning_rate=0.1),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x / 16, y, batch_size=256, epochs=10, verbose=2).history
print(f"{len(devices)} devices, accuracy: {history['accuracy'][-1]:.3f}")
