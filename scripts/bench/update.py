"""Times one update of the optimizers alone: `python -m scripts.bench.update --json=out.json`.

The forms of the fused NLCG update beside a reference one, Keras' Adam and Keras' SGD with momentum,
on the variables of ResNet-50 and ResNet-32 and on one long vector; in turn, in one process.
Gradients are read from variables, so that the op cannot take them over but has to copy them, one
transfer of the parameter vector that a training step does not have.
"""

import argparse
import ctypes
import math
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import nlcg_tf
from nlcg_tf.polar import shared_by
from scripts.shared.timing import interleaved, machine, ratio, show_ratio, write_json
from trainers.engine.files import output_file
from trainers.models.cifar_resnet import cifar_resnet

# The settings of NLCG, and how often they read or write a vector of the parameters' size.
FORMS = {
    "bfgs": ({"preconditioner": "bfgs"}, 14),
    "bfgs, line search": ({"preconditioner": "bfgs", "line_search": "online"}, 14),
    "normalized_bfgs": ({"preconditioner": "normalized_bfgs"}, 14),
    "normalized_bfgs, blended, nesterov": (
        {"preconditioner": "normalized_bfgs", "update_rule": "blended", "nesterov": True},
        16,
    ),
    # Without the polar factors: their time is that of scripts.bench.polar.
    "spectral": ({"preconditioner": "spectral", "update_rule": "momentum", "nesterov": True}, 8),
}


def nlcg(fused=True, **settings):
    usual = {"update_rule": "fletcher_reeves", "nesterov": False, "line_search": None}
    return nlcg_tf.NLCG(1e-4, fused=fused, **{**usual, **settings})


OPTIMIZERS = {
    **{name: lambda s=settings: nlcg(**s) for name, (settings, _) in FORMS.items()},
    "reference": lambda: nlcg(fused=False, preconditioner="bfgs"),
    "adam": lambda: keras.optimizers.Adam(1e-4),
    "momentum": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
}


def shapes_of(name):
    if name == "resnet50":
        model = keras.applications.ResNet50(weights=None)
    elif name == "resnet32":
        model = cifar_resnet(32, (32, 32, 3), 100)
    else:
        return [(int(float(name)),)]
    return [tuple(v.shape) for v in model.trainable_variables]


def update_call(make, shapes, gradients):
    """A function that does one update of variables of these shapes, in a graph."""
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=s, scale=0.05).astype("float32")) for s in shapes]
    optimizer = make()
    optimizer.build(variables)

    # In a training step gradients are tensors of the graph, not arguments that Python checks.
    @tf.function
    def step():
        if isinstance(optimizer, nlcg_tf.NLCG):
            optimizer.observe_loss(1.0)
        with shared_by(lambda matrices, _: matrices):
            optimizer.apply([g.read_value() for g in gradients], variables)

    def call():
        step()
        optimizer.iterations.numpy()  # waits

    call.optimizer = optimizer
    return call


def shrink(gradients):
    """Makes the gradients a little smaller: a convex problem, on which y^T s is positive."""
    for gradient in gradients:
        gradient.assign(0.99 * gradient)


def triad_call(size):
    """A function that runs a triad of three vectors of `size` floats on all cores."""
    source = pathlib.Path(__file__).with_name("triad.cc")
    library = pathlib.Path(tempfile.mkdtemp(), "triad.so")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    vectors = [np.ones(size, np.float32) for _ in range(3)]
    pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in vectors]
    count = (ctypes.c_int64(size), machine()["cores"])
    return lambda: functions.triad(*pointers, ctypes.c_float(3), *count)


def bench(name, repeats):
    shapes = shapes_of(name)
    size = sum(math.prod(shape) for shape in shapes)
    rng = np.random.default_rng(1)
    gradients = [tf.Variable(rng.normal(size=s, scale=1e-2).astype("float32")) for s in shapes]
    calls = {key: update_call(make, shapes, gradients) for key, make in OPTIMIZERS.items()}
    seconds = interleaved(calls, repeats, prepare=lambda: shrink(gradients))
    for name_of_form in FORMS:
        # An update whose curvature is rejected does not write h, and would be no measure.
        assert calls[name_of_form].optimizer.diagnostics()["rejected_curvatures"] == 0
    # Not among them: it would sweep the small models out of the cache.
    vectors = max(size, 20_000_000)
    memory = interleaved({"triad": triad_call(vectors)}, 10)
    triad = 3 * 4 * vectors / np.median(memory["triad"]) / 1e9
    result = {
        "parameters": size,
        "tensors": len(shapes),
        "milliseconds": {key: 1e3 * np.median(values) for key, values in seconds.items()},
        "triad_gigabytes_per_second": triad,
        "forms": {},
    }
    print(f"{name}: {size:,} parameters in {len(shapes)} tensors, {repeats} rounds")
    print("  median ms: " + ", ".join(f"{k} {v:.2f}" for k, v in result["milliseconds"].items()))
    for form, (_, transfers) in FORMS.items():
        gigabytes = transfers * 4 * size / 1e9
        bandwidth = gigabytes / np.median(seconds[form])
        others = ("momentum", "adam", "reference")
        result["forms"][form] = {
            "ratios": {key: ratio(seconds, form, key) for key in others},
            "gigabytes_moved": gigabytes,
            "share_of_triad": bandwidth / triad,
        }
        print(
            f"  {form}: {transfers} transfers, {bandwidth:.1f} GB/s, {bandwidth / triad:.0%} "
            f"of the triad's {triad:.1f}"
        )
        for key, value in result["forms"][form]["ratios"].items():
            show_ratio(f"{form} / {key}", value)
    return result


def peak_memory(path):
    """Peak memory of three updates of a 25.6 M vector above what lay there before, in vectors."""
    code = f"""
import numpy as np, tensorflow as tf, keras
from scripts.bench import update as b
size = 25_600_000
gradient = [tf.Variable(np.full(size, 0.01, np.float32))]
call = b.update_call(b.OPTIMIZERS[{path!r}], [(size,)], gradient)
open("/proc/self/clear_refs", "w").write("5")
read = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))
before = read("VmRSS")
for _ in range(3):
    call()
print((read("VmHWM") - before) * 1024 / 4 / size)
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", code]
    return float(subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["resnet50", "resnet32", "1e8"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=output_file, help="file for all figures")
    arguments = parser.parse_args()
    result = {"machine": machine(), "build": nlcg_tf.fused.build_info(), "cases": {}}
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    for name in arguments.cases:
        repeats = arguments.repeats * (10 if name == "resnet32" else 1)
        result["cases"][name] = bench(name, repeats)
    result["peak_memory_in_vectors"] = {p: peak_memory(p) for p in ("bfgs", "reference")}
    print(
        "peak memory of an update above the variables, in parameter vectors: "
        + ", ".join(
            f"{path} {value:.2f}" for path, value in result["peak_memory_in_vectors"].items()
        )
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
