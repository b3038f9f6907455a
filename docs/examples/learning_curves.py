"""Learning curves of NLCG, Adam and SGD on handwritten digits: writes learning_curves.png."""

import keras
from keras import layers
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import nlcg_tf

x, y = load_digits(return_X_y=True)
x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.2, random_state=0)
loss = "sparse_categorical_crossentropy"


def train(make_optimizer, rate):
    """Test accuracy after each of 10 epochs, 60 updates."""
    keras.utils.set_random_seed(0)
    body = [keras.Input((64,)), layers.Reshape((8, 8, 1))]
    for filters in (32, 64):
        body += [layers.Conv2D(filters, 3), layers.BatchNormalization(momentum=0.8), layers.ReLU()]
    model = keras.Sequential([*body, layers.Flatten(), layers.Dense(10, "softmax")])
    optimizer = make_optimizer(keras.optimizers.schedules.CosineDecay(rate, 60))
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return model.fit(x, y, 256, 10, 0, validation_data=(x_test, y_test)).history["val_accuracy"]


optimizers = {
    "NLCG": (lambda rate: nlcg_tf.NLCG(rate, preconditioner="spectral"), [0.02, 0.04, 0.08]),
    "Adam": (keras.optimizers.Adam, [0.003, 0.01, 0.03]),
    "SGD": (lambda rate: keras.optimizers.SGD(rate, 0.9, nesterov=True), [0.1, 0.3, 1.0]),
}
for name, (make_optimizer, rates) in optimizers.items():
    curves = {f"{name}, rate {rate}": train(make_optimizer, rate) for rate in rates}
    best = max(curves, key=lambda label: sum(curves[label]))
    pyplot.plot(range(1, 11), curves[best], label=best)
    print(f"{best}: test accuracy {curves[best][-1]:.3f}")
pyplot.legend()
pyplot.savefig("learning_curves.png")
