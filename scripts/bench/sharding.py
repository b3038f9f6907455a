"""Sharded against whole optimizers: `python -m scripts.bench.sharding --json=out.json`.

For NLCG's default, its spectral form, Keras' Adam and SGD with momentum, on the variables of
ResNet-50, two Horovod workers of one thread each:

update: the optimizer's work alone, on half of the parameters over on all of them; NLCG's small
    all-reduces are in it.
step: gradients in, weights out, with what the workers send each other, sharded over whole.
bytes: what passed through the loopback interface in a step, sharded over whole.
slots: bytes of the optimizer's slots on a worker, sharded over whole.
"""

import argparse
import math
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from scripts.shared.timing import interleaved, machine, ratio, show_ratio, write_json
from trainers.engine.files import output_file


def optimizers():
    import nlcg_tf

    return {
        "NLCG": lambda: nlcg_tf.NLCG(1e-4, fused=True),
        "NLCG, spectral": lambda: nlcg_tf.NLCG(1e-4, "momentum", "spectral", fused=True),
        "Adam": lambda: keras.optimizers.Adam(1e-4),
        "SGD, momentum": lambda: keras.optimizers.SGD(1e-4, momentum=0.9),
    }


class Side:
    """An optimizer, whole or sharded, with variables of its own and gradients for them."""

    def __init__(self, make, shapes, shard):
        import nlcg_tf.horovod as hvd

        rng = np.random.default_rng(0)
        normal = lambda s: rng.normal(size=s, scale=0.05).astype("float32")  # noqa: E731
        self.variables = [keras.Variable(normal(s)) for s in shapes]
        self.gradients = [tf.Variable(normal(s)) for s in shapes]
        self.optimizer = hvd.DistributedOptimizer(make(), shard=shard)
        self.optimizer.build(self.variables)
        shards = self.optimizer.division.weights if shard else ()
        self.parts = [tf.Variable(normal(v.shape)) for v in shards]

    def step(self):
        """A function that does one step with its communication."""

        @tf.function
        def step():
            self._observe()
            self.optimizer.apply([g.read_value() for g in self.gradients], self.variables)

        return lambda: (step(), self.optimizer.iterations.numpy())

    def update(self):
        """A function that does the update alone."""
        optimizer = self.optimizer

        @tf.function
        def update():
            self._observe()
            if self.parts:
                optimizer._update_shards([g.read_value() for g in self.parts], 1e-4)
            else:
                gradients = [g.read_value() for g in self.gradients]
                optimizer._backend_update_step(gradients, self.variables, 1e-4)

        return lambda: (update(), optimizer.iterations.numpy())

    def slot_bytes(self):
        slots = self.optimizer.variables
        if hasattr(self.optimizer, "division"):
            slots = self.optimizer.division.slots.values()
        return sum(4 * math.prod(v.shape) for v in slots if len(v.shape))

    def _observe(self):
        if hasattr(self.optimizer, "observe_loss"):
            self.optimizer.observe_loss(1.0)


def loopback_bytes():
    for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("there is no loopback interface")


def sent_by(call, repeats=3):
    """Bytes that both workers send in a call; all are at rest before and after."""
    import nlcg_tf.horovod as hvd

    hvd.allgather_object("ready")
    before = loopback_bytes()
    for _ in range(repeats):
        call()
    hvd.allgather_object("done")
    return (loopback_bytes() - before) / repeats


def bench(name, make, shapes, repeats):
    sides = {"whole": Side(make, shapes, False), "sharded": Side(make, shapes, True)}
    result = {}
    for what in ("update", "step"):
        calls = {key: getattr(side, what)() for key, side in sides.items()}
        seconds = interleaved(calls, repeats)
        result[what] = ratio(seconds, "sharded", "whole")
        result[f"{what}_milliseconds"] = {k: 1e3 * np.median(v) for k, v in seconds.items()}
        show_ratio(f"{name}: {what}, sharded / whole", result[what])
    sent = {key: sent_by(call) for key, call in calls.items()}
    result["bytes"] = sent["sharded"] / sent["whole"]
    slots = {key: side.slot_bytes() for key, side in sides.items()}
    result["slots"] = slots["sharded"] / slots["whole"]
    print(f"  {name}: bytes sent {result['bytes']:.4f}, slots {result['slots']:.4f}")
    print(
        "  milliseconds: "
        + ", ".join(
            f"{what} {key} {value:.1f}"
            for what in ("update", "step")
            for key, value in result[f"{what}_milliseconds"].items()
        )
    )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", default="resnet50", help="resnet50, resnet32 or a number")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=output_file, help="file for all figures")
    options = parser.parse_args()
    if "HOROVOD_RANK" not in os.environ:
        launcher = pathlib.Path(sys.executable).with_name("horovodrun")
        command = [str(launcher), "--gloo", "-np", "2", sys.executable]
        os.execv(launcher, [*command, "-m", "scripts.bench.sharding", *sys.argv[1:]])
    import nlcg_tf.horovod as hvd
    from scripts.bench.update import shapes_of

    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if hvd.rank() > 0:
        sys.stdout = open(os.devnull, "w")
    shapes = shapes_of(options.parameters)
    size = sum(map(math.prod, shapes))
    result = {"machine": machine(), "parameters": size, "optimizers": {}}
    print(f"{result['machine']['processor']}, {hvd.size()} workers, {size:,} parameters")
    for name, make in optimizers().items():
        result["optimizers"][name] = bench(name, make, shapes, options.repeats)
    if hvd.rank() == 0:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
