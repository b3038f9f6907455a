"""A training loop of your own, which tells the optimizer the loss."""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import nlcg_tf

keras.utils.set_random_seed(0)
x, y = load_digits(return_X_y=True)
x, held_out = (x / 16).astype("float32"), np.arange(len(x)) % 5 == 0
layers = [keras.Input((64,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(10)]
model = keras.Sequential(layers)
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
optimizer = nlcg_tf.NLCG(learning_rate=0.1)


@tf.function
def train_step(images, labels):
    with tf.GradientTape() as tape:
        loss = loss_fn(labels, model(images, training=True))
    optimizer.observe_loss(loss)  # before `apply`: the update rule looks at the loss
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)


examples = tf.data.Dataset.from_tensor_slices((x[~held_out], y[~held_out]))
for epoch in range(20):
    for images, labels in examples.shuffle(len(x), seed=epoch).batch(256):
        train_step(images, labels)
    shown = optimizer.diagnostics()
    print(f"epoch {epoch}: beta {shown['beta']:.2f}, cosine {shown['cosine']:.2f}")
accuracy = np.mean(np.argmax(model(x[held_out]), axis=1) == y[held_out])
print(f"accuracy on held-out digits: {accuracy:.3f}")
