"""A physics-informed network for u'' = f on [0, 1], with full batches."""

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf

keras.utils.set_random_seed(0)
x = tf.constant(np.linspace(0, 1, 64)[:, None], tf.float32)
solution = (tf.sin(np.pi * x) + tf.sin(3 * np.pi * x) / 9) / np.pi**2
f = -tf.sin(np.pi * x) - tf.sin(3 * np.pi * x)  # its second derivative
hidden = [keras.layers.Dense(24, "tanh"), keras.layers.Dense(24, "tanh")]
model = keras.Sequential([keras.Input((1,)), *hidden, keras.layers.Dense(1)])
optimizer = nlcg_tf.NLCG(learning_rate=0.1)


@tf.function
def train_step():
    with tf.GradientTape() as tape:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                u = x * (1 - x) * model(x)  # zero at both ends, whatever the weights are
            derivative = inner.gradient(u, x)
        loss = tf.reduce_mean((outer.gradient(derivative, x) - f) ** 2)
    optimizer.observe_loss(loss)
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return loss, u


for update in range(1001):
    loss, u = train_step()
    if update % 200 == 0:
        ratio = optimizer.diagnostics()["gain_ratio"]
        print(f"update {update}: loss {loss:.3g}, gain ratio {ratio:.2f}")
print(f"relative error of the solution: {tf.norm(u - solution) / tf.norm(solution):.2e}")
