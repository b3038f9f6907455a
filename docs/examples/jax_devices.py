"""NLCG on two devices of JAX, which Keras divides the batch, or the model, between."""

import os

os.environ["KERAS_BACKEND"] = "jax"
# Two devices on a machine without any; leave this out where there are GPUs or TPUs.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
from keras import distribution
from sklearn.datasets import load_digits

import nlcg_tf

devices = distribution.list_devices()
# Each device has a part of each batch, and all weights.
parallel = distribution.DataParallel(devices=devices)
distribution.set_distribution(parallel)

# Or: each device has a part of the hidden layer, and of the optimizer's state for it.
#   mesh = distribution.DeviceMesh((1, len(devices)), ["batch", "model"], devices)
#   layout = distribution.LayoutMap(mesh)
#   layout[".*hidden/kernel"] = (None, "model")
#   layout[".*hidden/bias"] = ("model",)
#   parallel = distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")

x, y = (part[:1792] for part in load_digits(return_X_y=True))  # batches that divide evenly
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(64, "relu", name="hidden"),
        keras.layers.Dense(10),
    ]
)
model.compile(
    optimizer=nlcg_tf.NLCG(learning_rate=0.1),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
history = model.fit(x / 16, y, batch_size=256, epochs=10, verbose=2).history
print(f"{len(devices)} devices, accuracy: {history['accuracy'][-1]:.3f}")
