"""Times the polar factors of ResNet-50's kernels: `python -m scripts.bench.polar --json=out.json`.

By shape, all together, and as a share of an update at virtual batches of several sizes, whose
images are those of a batch of 16 at 224 x 224 pixels, forward and backward. Two workers share the
factors: `scripts/launch_horovodrun.sh -n 2 -- .venv/bin/python -m scripts.bench.polar`; there
worker 0 also times what it takes to compute all of them by itself.
"""

import argparse
import collections
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from nlcg_tf.polar import matrix_shape, operations, polar_factors, shared_by
from scripts.bench.step import step_call
from scripts.shared.timing import interleaved, machine, ratio, show_ratio, write_json
from trainers.engine.cluster import connect
from trainers.engine.files import output_file

BATCH, SIZE, CLASSES = 16, 224, 1000
VIRTUAL_BATCHES = (256, 2048, 16384)


def factors_call(shapes, share=None):
    """A function that computes the factors of matrices of these shapes, in a graph, and waits."""
    rng = np.random.default_rng(0)
    matrices = [tf.Variable(rng.normal(size=shape).astype("float32")) for shape in shapes]

    @tf.function
    def factors():
        with shared_by(share):
            found = polar_factors([x.read_value() for x in matrices])
        return tf.add_n([tf.reduce_sum(x) for x in found])

    return lambda: factors().numpy()


def by_shape(shapes, repeats):
    """Milliseconds of all factors of each shape or its transpose, the costliest first."""
    counts = collections.Counter((max(s), min(s)) for s in shapes)
    costs = {shape: count * operations(shape) for shape, count in counts.items()}
    order = sorted(counts, key=lambda shape: -costs[shape])
    calls = {shape: factors_call([shape] * counts[shape]) for shape in order}
    seconds = interleaved(calls, repeats)
    result = {}
    for shape in order:
        milliseconds = 1e3 * float(np.median(seconds[shape]))
        speed = 2 * costs[shape] / milliseconds / 1e6
        result["x".join(map(str, shape))] = milliseconds
        print(f"  {counts[shape]} x {shape}: {milliseconds:.1f} ms, {speed:.0f} GFLOP/s")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=output_file, help="file for all figures")
    arguments = parser.parse_args()
    cluster = connect()
    if cluster.size() > 1:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    model = keras.applications.ResNet50(weights=None)
    kernels = [v.shape for v in model.trainable_variables if len(v.shape) > 1]
    shapes = [matrix_shape(shape) for shape in kernels]
    result = {"machine": machine(), "workers": cluster.size()}
    if cluster.size() > 1:
        result.update(shared(shapes, cluster, arguments.repeats))
    else:
        print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
        result["milliseconds_by_shape"] = by_shape(shapes, arguments.repeats)
        result.update(share_of_an_update(model, shapes, arguments.repeats))
    if cluster.rank() == 0:
        write_json(arguments.json, result)


def shared(shapes, cluster, repeats):
    """Each worker on one thread: the factors of all by one of them, and by all together."""
    from nlcg_tf.horovod.factors import share

    alone, together = factors_call(shapes), factors_call(shapes, share)
    seconds = {"shared": [], "alone": []}
    for _ in range(repeats + 1):
        cluster.sum_over_workers([0.0])  # all begin at once
        seconds["shared"].append(interleaved({"": together}, 1, 0)[""][0])
        # One works, as a worker by itself would, with the other core idle.
        if cluster.rank() == 0:
            seconds["alone"].append(interleaved({"": alone}, 1, 0)[""][0])
    if cluster.rank() > 0:
        return {}
    seconds = {name: np.array(values[1:]) for name, values in seconds.items()}
    value = ratio(seconds, "shared", "alone")
    show_ratio(f"{cluster.size()} workers / one", value)
    return {"over_one_worker": value}


def share_of_an_update(model, shapes, repeats):
    rng = np.random.default_rng(0)
    images = tf.constant(rng.normal(size=(BATCH, SIZE, SIZE, 3)), tf.float32)
    labels = tf.constant(rng.integers(0, CLASSES, BATCH))
    calls = {
        "factors": factors_call(shapes),
        "images": step_call(lambda: model, lambda: keras.optimizers.SGD(1e-4), images, labels),
    }
    seconds = interleaved(calls, repeats)
    one = ratio(seconds, "factors", "images")
    print(f"  all {len(shapes)} kernels: {1e3 * np.median(seconds['factors']):.0f} ms")
    shares = {}
    for batch in VIRTUAL_BATCHES:
        over_images = one["median"] * BATCH / batch
        shares[batch] = over_images / (1 + over_images)
        print(f"  share of an update at a virtual batch of {batch:,}: {shares[batch]:.2%}")
    return {"over_16_images": one, "share_of_an_update": shares}


if __name__ == "__main__":
    main()
