"""Times the CUDA kernels beside a device copy, the reference update in XLA and PyTorch's Adam."""

import os
import time

import numpy as np

from scripts.shared.timing import turns
from tests.fused.cuda_problem import Problem, Variant
from tests.fused.devices import Torch

SIZE = 100_000_000
# Rule, variant, and how often an update reads or writes a vector of the parameters' size.
TIMED = [
    ("fletcher_reeves", Variant(), 14),
    ("blended", Variant("normalized_bfgs", nesterov=True), 16),
    ("momentum", Variant("given", nesterov=True), 8),
]


def reference_call(rule, variant, size):
    """The same update in Keras operations, compiled by XLA.

    Returns:
        A function that does one and waits; `None` without JAX and Keras.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    try:
        import jax
        import keras

        import nlcg_tf
    except ImportError as error:
        print(f"no reference update: {error}")
        return None
    if variant.preconditioner == "given":
        return None  # Keras computes most of it
    weights = keras.Variable(np.ones(size, np.float32))
    settings = {"nesterov": variant.nesterov, "fused": False}
    optimizer = nlcg_tf.NLCG(1e-4, rule, variant.preconditioner, **settings)
    optimizer.build([weights])

    def update(weights, state, gradient):
        optimizer.observe_loss(1.0)
        return optimizer.stateless_apply(state, [gradient], [weights])

    step = jax.jit(update, donate_argnums=(0, 1))
    held = [weights.value, [v.value for v in optimizer.variables]]
    gradient = jax.device_put(np.full(size, 0.01, np.float32))

    def call():
        nonlocal gradient
        gradient = 0.99 * gradient
        (held[0],), held[1] = step(*held, gradient)
        jax.block_until_ready(held)

    return call


def times(device, library, rule, variant, transfers, size=SIZE):
    """Milliseconds of updates, and of what they are compared with: name -> list."""
    problem = Problem(device, library, [size], "float32", rule, variant)
    problem.set(np.full(size, 0.01), 1e-4, 1.0)
    target, source = (device.put(np.zeros(size * transfers // 2, np.float32)) for _ in range(2))

    def copy():
        target[...] = source

    calls = {
        "NLCG update": lambda: problem.update(fresh=False),
        "device copy of the same bytes": copy,
    }
    if isinstance(device, Torch):
        parameter = device.torch.nn.Parameter(device.put(np.ones(size, np.float32)))
        parameter.grad = device.put(np.full(size, 0.01, np.float32))
        calls["PyTorch fused Adam"] = device.torch.optim.Adam([parameter], fused=True).step
    # On a stream of its own, which no event of the device's library sees: by the clock.
    reference = {"reference, under XLA": reference_call(rule, variant, size)}
    calls.update({name: call for name, call in reference.items() if call})
    found = {name: [] for name in calls}
    for repeat, name in turns(calls, 23):
        if name == "NLCG update":
            # A convex problem: an update whose curvature is rejected does not write h.
            problem.g[0] *= 0.99
        if name in reference:
            began = time.perf_counter()
            calls[name]()
            milliseconds = 1e3 * (time.perf_counter() - began)
        else:
            start, end = device.event(), device.event()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            milliseconds = device.elapsed(start, end)
        if repeat >= 3:
            found[name].append(milliseconds)
    assert device.get(problem.counts).tolist() == [23, 0, 0, 1], "not all updates were whole"
    return found


def show_times(device, library):
    for rule, variant, transfers in TIMED:
        found = times(device, library, rule, variant, transfers)
        copied = np.median(found["device copy of the same bytes"])
        print(f"{SIZE:,} floats, {variant.preconditioner}, {rule}, nesterov={variant.nesterov}")
        for name, milliseconds in found.items():
            low, median, high = np.percentile(milliseconds, [25, 50, 75])
            speed = ""
            if name in ("NLCG update", "device copy of the same bytes"):
                moved = transfers * 4 * SIZE
                speed = f"{moved / median / 1e6:,.0f} GB/s, {copied / median:.0%} of the copy's"
            print(f"  {name:<30} {median:.3f} ms ({low:.3f} to {high:.3f}) {speed}")
