"""Times one update of the optimizers alone: `python -m scripts.bench_update --json=out.json`.

The fused NLCG update beside the composed one, Keras' Adam and Keras' SGD with momentum, on the
variables of ResNet-50 and ResNet-32 and on one long vector; in turn, in one process. Gradients are
read from variables, so that the op cannot take them over but has to copy them (16 transfers of the
parameter vector; 15 in a training step).
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
from scripts.benchmarks import interleaved, machine, ratio, show_ratio, write_json
from trainers.models import cifar_resnet

TRANSFERS = 16
READS = 12  # of these
OPTIMIZERS = {
    "fused": lambda: nlcg_tf.NLCG(1e-4, line_search=None, fused=True),
    "composed": lambda: nlcg_tf.NLCG(1e-4, line_search=None, fused=False),
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
    step = tf.function(lambda: optimizer.apply([g.read_value() for g in gradients], variables))

    def call():
        step()
        optimizer.iterations.numpy()  # waits

    call.optimizer = optimizer
    return call


def shrink(gradients):
    """Makes the gradients a little smaller: a convex problem, on which y^T s is positive."""
    for gradient in gradients:
        gradient.assign(0.99 * gradient)


def memory_calls(size):
    """Functions that run a triad, and read, three vectors of `size` floats on all cores."""
    source = pathlib.Path(__file__).with_name("triad.cc")
    library = pathlib.Path(tempfile.mkdtemp(), "triad.so")
    # -ffast-math: without it the maximum of floats is not vectorised.
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))
    vectors = [np.ones(size, np.float32) for _ in range(3)]
    pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in vectors]
    count = (ctypes.c_int64(size), machine()["cores"])
    return {
        "triad": lambda: functions.triad(*pointers, ctypes.c_float(3), *count),
        "read": lambda: functions.read_all(*pointers, *count),
    }


def bench(name, repeats):
    shapes = shapes_of(name)
    size = sum(math.prod(shape) for shape in shapes)
    rng = np.random.default_rng(1)
    gradients = [tf.Variable(rng.normal(size=s, scale=1e-2).astype("float32")) for s in shapes]
    calls = {key: update_call(make, shapes, gradients) for key, make in OPTIMIZERS.items()}
    seconds = interleaved(calls, repeats, prepare=lambda: shrink(gradients))
    # An update whose curvature is rejected does not write h, and would be no measure.
    for path in ("fused", "composed"):
        assert calls[path].optimizer.diagnostics()["rejected_curvatures"] == 0
    # Not among them: it would sweep the small models out of the cache.
    vectors = max(size, 20_000_000)
    memory = interleaved(memory_calls(vectors), 10)
    triad, read = (3 * 4 * vectors / np.median(memory[key]) / 1e9 for key in ("triad", "read"))
    moved = TRANSFERS * 4 * size
    bandwidth = moved / np.median(seconds["fused"]) / 1e9
    result = {
        "parameters": size,
        "tensors": len(shapes),
        "milliseconds": {key: 1e3 * np.median(values) for key, values in seconds.items()},
        "ratios": {key: ratio(seconds, "fused", key) for key in ("momentum", "adam", "composed")},
        "bytes_moved": moved,
        "gigabytes_per_second": bandwidth,
        "triad_gigabytes_per_second": triad,
        "share_of_triad": bandwidth / triad,
        "read_gigabytes_per_second": read,
        "milliseconds_of_reading_alone": READS * 4 * size / read / 1e6,
    }
    print(f"{name}: {size:,} parameters in {len(shapes)} tensors, {repeats} rounds")
    print("  median ms: " + ", ".join(f"{k} {v:.2f}" for k, v in result["milliseconds"].items()))
    for key, value in result["ratios"].items():
        show_ratio(f"fused NLCG / {key}", value)
    print(
        f"  {moved / 1e6:,.0f} MB moved, {bandwidth:.1f} GB/s, "
        f"{bandwidth / triad:.0%} of the triad's {triad:.1f} GB/s"
    )
    print(
        f"  its {READS} reads of the parameters alone take "
        f"{result['milliseconds_of_reading_alone']:.2f} ms at the {read:.1f} GB/s of mere reading"
    )
    return result


def bench_linearity(repeats):
    """Nanoseconds a parameter of the fused update for vectors of growing size."""
    result = {}
    for size in (4_000_000, 16_000_000, 64_000_000):
        gradient = [tf.Variable(np.full(size, 0.01, np.float32))]
        call = update_call(OPTIMIZERS["fused"], [(size,)], gradient)
        result[size] = (
            1e9
            * np.median(
                interleaved({"fused": call}, repeats, prepare=lambda g=gradient: shrink(g))["fused"]
            )
            / size
        )
    print("linearity: " + ", ".join(f"{n:,}: {ns:.2f} ns" for n, ns in result.items()))
    return result


def peak_memory(path):
    """Peak memory of three updates of a 25.6 M vector above what lay there before, in vectors."""
    code = f"""
import numpy as np, tensorflow as tf, keras
from scripts import bench_update as b
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
    parser.add_argument("--json", help="file for all figures")
    arguments = parser.parse_args()
    result = {"machine": machine(), "build": nlcg_tf.fused.build_info(), "cases": {}}
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    for name in arguments.cases:
        repeats = arguments.repeats * (10 if name == "resnet32" else 1)
        result["cases"][name] = bench(name, repeats)
    result["nanoseconds_a_parameter"] = bench_linearity(arguments.repeats)
    result["peak_memory_in_vectors"] = {p: peak_memory(p) for p in ("fused", "composed")}
    print(
        "peak memory of an update above the variables, in parameter vectors: "
        + ", ".join(
            f"{path} {value:.2f}" for path, value in result["peak_memory_in_vectors"].items()
        )
    )
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
