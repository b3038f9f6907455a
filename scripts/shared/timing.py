"""What the benchmarks share: interleaved timing, ratios with their spread, the machine, JSON."""

import json
import os
import pathlib
import platform
import time

import numpy as np


def turns(names, rounds):
    """`(round, name)` in turn, A B C B C A C A B ..., so that a slow moment hits all alike."""
    names = list(names)
    for round_ in range(rounds):
        first = round_ % len(names)
        for name in [*names[first:], *names[:first]]:
            yield round_, name


def interleaved(calls, repeats, warmup=2, prepare=None):
    """Times functions in turn.

    Args:
        calls: dict of functions without arguments that return when the work is done.
        repeats: int, timed rounds.
        warmup: int, rounds before.
        prepare: function to be called before each round, not timed.

    Returns:
        dict of arrays of seconds, one entry a round.
    """
    seconds = {name: [] for name in calls}
    prepared = None
    for round_, name in turns(calls, warmup + repeats):
        if prepare is not None and prepared != round_:
            prepare()
            prepared = round_
        began = time.perf_counter()
        calls[name]()
        if round_ >= warmup:
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(values) for name, values in seconds.items()}


def ratio(seconds, name, other):
    """`name` over `other`, round by round: median and quartiles."""
    low, median, high = np.percentile(seconds[name] / seconds[other], [25, 50, 75])
    return {"median": median, "quartiles": [low, high]}


def show_ratio(title, value):
    low, high = value["quartiles"]
    print(f"  {title:<44} {value['median']:.3f}  ({low:.3f} to {high:.3f})")


def machine():
    """The processor and the cores that this process may use."""
    model = platform.processor()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {"processor": model, "cores": len(os.sched_getaffinity(0))}


def write_json(path, result):
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {path}")
