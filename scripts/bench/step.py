"""Times a whole training step: `python -m scripts.bench.step --json=out.json`.

Forms of NLCG with the fused op, and one reference, beside Keras' SGD with momentum: forward,
backward, update; in turn, in one process, on random images.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from scripts.bench import update
from scripts.shared.timing import interleaved, machine, ratio, show_ratio, write_json
from trainers.engine.files import output_file
from trainers.models.cifar_resnet import cifar_resnet

CASES = {
    "resnet32": (lambda: cifar_resnet(32, (32, 32, 3), 100), 128, 32, 100),
    "resnet50": (lambda: keras.applications.ResNet50(weights=None), 16, 224, 1000),
}
OPTIMIZERS = {name: make for name, make in update.OPTIMIZERS.items() if name != "adam"}


def step_call(make_model, make_optimizer, images, labels):
    model, optimizer = make_model(), make_optimizer()
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=model.layers[-1].activation is keras.activations.linear
    )
    model.compile(optimizer=optimizer, loss=loss, jit_compile=False)
    return lambda: model.train_on_batch(images, labels)


def bench(name, repeats):
    make_model, batch, size, classes = CASES[name]
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(batch, size, size, 3)), tf.float32)
    labels = tf.constant(rng.integers(0, classes, batch))
    calls = {key: step_call(make_model, make, images, labels) for key, make in OPTIMIZERS.items()}
    seconds = interleaved(calls, repeats)
    result = {
        "batch": batch,
        "milliseconds": {key: 1e3 * np.median(values) for key, values in seconds.items()},
        "over_momentum": {
            form: ratio(seconds, form, "momentum") for form in OPTIMIZERS if form != "momentum"
        },
    }
    print(f"{name}, batch {batch}, {size}x{size}, {repeats} rounds")
    print("  median ms: " + ", ".join(f"{k} {v:.1f}" for k, v in result["milliseconds"].items()))
    for form, value in result["over_momentum"].items():
        show_ratio(f"{form} / momentum", value)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=output_file, help="file for all figures")
    arguments = parser.parse_args()
    result = {"machine": machine(), "cases": {}}
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    for name in arguments.cases:
        repeats = arguments.repeats * (4 if name == "resnet32" else 1)
        result["cases"][name] = bench(name, repeats)
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
