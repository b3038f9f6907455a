"""A model of how ResNet-50 scales over workers: ring all-reduce after each virtual batch."""

import numpy as np

RESNET50_PARAMETERS = 25_600_000
PREDICTED_WORKERS = (64, 256, 1024)
# A sharded optimizer: the sizes of models, NLCG's transfers of the parameters (default settings),
# the sums that its sweeps need of all workers, and its slots.
MODELS = (RESNET50_PARAMETERS, 1_000_000_000)
TRANSFERS, SUMS, SLOTS = 16, 3, 3
LARGE_BATCH = 98_304  # the largest of the paper (arXiv:1812.02886)
GRADIENTS = {"float32": 4, "float16": 2}  # bytes a number on the wire
ASSUMPTIONS = """\
  a worker computes {images_per_second:g} images/s (--images-per-second; 412 is NVIDIA's figure for
    ResNet-50 v1.5 in float32 on one V100, DeepLearningExamples), in micro-steps of {micro_batch}
    images (--micro-batch), {milliseconds:.0f} ms each; the update itself takes no time
  an update all-reduces 25.6 M gradients after its last micro-step, without overlap with the
    backward pass; without virtual batches each micro-step does (k = 1)
  one ring over all W workers: 2 (W - 1) hops of {hop_microseconds:g} us (--hop-microseconds: the
    latency fitted here is not a network's), and 2 (W - 1) / W of the gradients through each
    worker's own link at its full rate
  each all-reduce also costs Horovod's {fixed:.2f} ms, the fitted fixed cost here; that its
    negotiation grows with W, slow workers and other traffic are not in the model"""


def ring_seconds(workers, size, latency, bandwidth):
    """Time of a ring all-reduce of `size` bytes, 2 (W - 1) alpha + 2 (W - 1) / W n / B.

    Args:
        latency: alpha, seconds a hop.
        bandwidth: B, bytes a second.
    """
    return 2 * (workers - 1) * latency + 2 * (workers - 1) / workers * size / bandwidth


def sharding_seconds(workers, parameters, bytes_per_second, latency, fixed):
    """What a sharded NLCG adds to a step, or saves where it is negative.

    The gradients' reduce-scatter and the weights' all-gather are the two halves of the ring
    all-reduce that they replace. What is left is the update, of which others do 1 - 1/W, and the
    small all-reduces between its sweeps. Copies into and out of the vectors that are sent are not
    counted.

    Args:
        bytes_per_second: of the memory, as the update reaches it.
        fixed: seconds of an all-reduce besides its hops.
    """
    update = 4 * TRANSFERS * parameters / bytes_per_second
    sums = SUMS * (ring_seconds(workers, 0, latency, np.inf) + fixed)
    return sums - (1 - 1 / workers) * update


def fit_ring(workers, sizes, seconds):
    """Fits `ring_seconds`: `(latency, bandwidth)` with the least squared relative errors."""
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    units = [ring_seconds(workers, 0, 1, np.inf), ring_seconds(workers, sizes, 0, 1)]
    columns = np.stack([unit / seconds for unit in units], axis=1)
    (latency, inverse), *_ = np.linalg.lstsq(columns, np.ones_like(sizes), rcond=None)
    return float(latency), float(1 / inverse)


def efficiency(micro_steps, compute, communication):
    """k t_compute / (k t_compute + t_allreduce), of the seconds of a micro-step and an update."""
    return micro_steps * compute / (micro_steps * compute + communication)


def needed_micro_steps(workers, options):
    """Micro-steps of an update of `LARGE_BATCH` images; a trainer needs a whole number."""
    return LARGE_BATCH / (workers * options.micro_batch)


def predict(workers, micro_steps, gbits, gradients, options, fixed):
    """Efficiency of ResNet-50 under `ASSUMPTIONS`; `gbits` in Gbit/s, `fixed` in seconds."""
    size = RESNET50_PARAMETERS * GRADIENTS[gradients]
    seconds = ring_seconds(workers, size, 1e-6 * options.hop_microseconds, gbits * 1e9 / 8)
    if workers > 1:
        seconds += fixed
    return efficiency(micro_steps, options.micro_batch / options.images_per_second, seconds)


def show_predictions(options, fixed):
    assumed = {
        "images_per_second": options.images_per_second,
        "micro_batch": options.micro_batch,
        "milliseconds": 1e3 * options.micro_batch / options.images_per_second,
        "hop_microseconds": options.hop_microseconds,
        "fixed": 1e3 * fixed,
    }
    print(f"predicted efficiency of ResNet-50; assumed:\n{ASSUMPTIONS.format(**assumed)}")
    columns = [(w, k) for w in PREDICTED_WORKERS for k in (1, 4, needed_micro_steps(w, options))]
    print(f"  {'workers W':<20}" + "".join(f"{w:>7,}" for w, _ in columns))
    print(f"  {'micro-steps k':<20}" + "".join(f"{k:>7.3g}" for _, k in columns))
    rows = []
    for gbits, gradients in ((g, name) for g in options.gbits for name in GRADIENTS):
        values = [predict(w, k, gbits, gradients, options, fixed) for w, k in columns]
        print(f"  {gbits:>3g} Gbit/s, {gradients:<7}" + "".join(f"{v:>7.0%}" for v in values))
        row = {"gbits": gbits, "gradients": gradients}
        rows += [
            {**row, "workers": w, "k": k, "efficiency": v} for (w, k), v in zip(columns, values)
        ]
    print(
        f"  the last k of each W makes a batch of {LARGE_BATCH:,}; without virtual batches: k = 1"
    )
    return {"assumed": assumed, "efficiency": rows}


def show_sharding(options, fixed):
    print(
        f"predicted for a sharded NLCG, whose update reaches {options.update_gbytes:g} GB/s of "
        f"memory (--update-gbytes) and needs {SUMS} small all-reduces:"
    )
    rows = []
    for parameters in MODELS:
        for workers in (8, *PREDICTED_WORKERS):
            rate, latency = 1e9 * options.update_gbytes, 1e-6 * options.hop_microseconds
            seconds = sharding_seconds(workers, parameters, rate, latency, fixed)
            saved = 4 * parameters * (SLOTS - (SLOTS + 1) / workers)  # a part has its weights too
            print(
                f"  {parameters / 1e6:>6,.1f} M parameters, {workers:>5,} workers: "
                f"{1e3 * seconds:+8.1f} ms a step, {saved / 1e9:5.2f} GB less a worker"
            )
            rows.append({"parameters": parameters, "workers": workers, "seconds": seconds})
    return rows


def plot_predictions(path, options, fixed):
    from scripts.shared.style import COLOURS, MARKERS, panels, pyplot

    workers = 2 ** np.arange(1, 12)
    micro_steps = {
        "4 micro-steps an update": [4 for _ in workers],
        f"batch of {LARGE_BATCH:,}": [needed_micro_steps(w, options) for w in workers],
    }
    figure, columns = panels(2, width=4.7, height=3.4, sharey=True)
    for (axis,), (title, steps) in zip(columns, micro_steps.items()):
        for gbits, colour, marker in zip(options.gbits, COLOURS, MARKERS):
            for ks, line in ((steps, "-"), ([1 for _ in workers], "--")):
                values = [predict(*x, gbits, "float32", options, fixed) for x in zip(workers, ks)]
                label = f"{gbits:g} Gbit/s" if line == "-" else None
                look = {"color": colour, "marker": marker, "markersize": 4, "label": label}
                axis.plot(workers, 100 * np.array(values), line, **look)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="workers", ylim=(0, 103))
        axis.set_xticks(workers[::2], [f"{w:,}" for w in workers[::2]])
    first = columns[0][0]
    first.plot([], [], "-", color="grey", label="with virtual batches")
    first.plot([], [], "--", color="grey", label="without: k = 1")
    first.set_ylabel("predicted efficiency (%)")
    first.legend(loc="lower center", ncols=2)
    figure.suptitle(
        f"ResNet-50, float32 gradients; assumed: {options.images_per_second:g} images/s a worker, "
        f"micro-steps of {options.micro_batch} images, {options.hop_microseconds:g} µs a hop",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"drawn in {path}")
