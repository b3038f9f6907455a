"""Scaling over workers: `python -m scripts.bench.scaling --json=out.json --plot=out.png`.

Three parts, each of which can run alone (`--parts`):

throughput: images per second of the trainer's update loop (NLCG, CIFAR ResNet, random images held
    in memory, k micro-steps an update) of one process alone, of two independent processes at the
    same time, and of two Horovod workers; one intra-op and one inter-op thread each. The figure
    that matters is two workers over two independent processes, on which the machine's own limits
    (caches, memory, clock) weigh alike. They take turns; those not in turn are stopped by SIGSTOP.
timeline: share of the time in communication, from Horovod's trace, apart from the timed runs.
model: all-reduces of 4 bytes to 64 MiB between two workers here, fitted with the cost of a ring,
    and what this predicts for ResNet-50 on networks that are not here, under `ASSUMPTIONS`.
"""

import argparse
import json
import pathlib
import signal
import sys

import numpy as np

from scripts.bench.ring_model import (
    fit_ring,
    plot_predictions,
    ring_seconds,
    show_predictions,
    show_sharding,
)
from scripts.bench.team import BYTES, WORKERS, Team, common_rates, horovod_team, work
from scripts.shared.timing import machine, ratio, show_ratio, turns, write_json
from trainers.engine.files import output_file


def covered(intervals):
    """Length of the union of `(begin, end)` intervals."""
    total, reached = 0.0, -np.inf
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def trace_intervals(events):
    """The intervals of a trace for chrome://tracing: name -> list of (begin, end)."""
    intervals, open_ = {}, {}
    for event in events:
        stack = open_.setdefault(event["pid"], [])
        if event["ph"] == "B":
            stack.append((event["name"], event["ts"]))
        elif event["ph"] == "E" and stack:
            name, begin = stack.pop()
            intervals.setdefault(name, []).append((begin, event["ts"]))
    return intervals


def communication_shares(events):
    """Shares of worker 0's time from the end of the first update's all-reduces to the last's.

    The tensors of an update are reduced together: their intervals are united, not summed.
    NEGOTIATE_ALLREDUCE lasts from worker 0's request until all workers have made theirs: most of it
    is waiting for the other worker. ALLREDUCE is the exchange: GLOO_ALLREDUCE is the transfer with
    the sum, the rest copies to and from the fusion buffer.
    """
    intervals = trace_intervals(events)
    ends = sorted(end for _, end in intervals["ALLREDUCE"])
    tensors = len({event["pid"] for event in events if event.get("name") == "ALLREDUCE"})
    first, last = ends[tensors - 1], ends[-1]

    def share(*names):
        inside = [i for name in names for i in intervals[name] if i[0] >= first]
        return covered(inside) / (last - first)

    return {
        "communication": share("NEGOTIATE_ALLREDUCE", "ALLREDUCE"),
        "negotiation and waiting": share("NEGOTIATE_ALLREDUCE"),
        "exchange": share("ALLREDUCE"),
        "transfer alone": share("GLOO_ALLREDUCE"),
    }


def measure_throughput(options):
    with Team(options) as independent, horovod_team(options) as joint:
        teams = {"alone": (independent, 1), "independent": (independent, 2), "joint": (joint, 2)}
        counts, rates = {}, {(k, name): [] for k in options.micro_steps for name in teams}
        for k, name in rates:
            team, members = teams[name]
            team.ask("updates", k, 2, members=members)  # compiles
            pace = min(common_rates([s]) for s in team.ask("updates", k, 5, members=members))[0]
            counts[k, name] = max(5, 2 + int(options.seconds * pace))
        for _, name in turns(teams, options.rounds):
            team, members = teams[name]
            for k in options.micro_steps:
                rate = sum(team.rates(k, counts[k, name], members))
                rates[k, name].append(k * options.batch * rate)
    result = {}
    print(f"throughput, ResNet-{options.depth}, micro-steps of {options.batch} images")
    for k in options.micro_steps:
        values = {name: np.array(rates[k, name]) for name in teams}
        result[k] = {"images_per_second": {name: v.tolist() for name, v in values.items()}}
        print(f" k = {k}, {options.rounds} rounds of {options.seconds:g} s")
        for name, value in values.items():
            low, median, high = np.percentile(value, [25, 50, 75])
            print(f"  images/s, {name:<34} {median:.1f}  ({low:.1f} to {high:.1f})")
        for other, title in (("independent", "2 independent processes"), ("alone", "1 alone")):
            result[k][f"joint_over_{other}"] = ratio(values, "joint", other)
            show_ratio(f"2 workers / {title}", result[k][f"joint_over_{other}"])
    return result


def measure_timeline(options):
    result = {}
    print("share of worker 0's time, from Horovod's timeline")
    with horovod_team(options, HOROVOD_TIMELINE="DYNAMIC") as team:
        team.ask("calm_timeline")
        for k in options.micro_steps:
            file = pathlib.Path(team.folder.name, f"{k}.json")
            team.ask("updates", k, 5)
            team.ask("trace", k, 1 + max(10, 60 // k), str(file))
            result[k] = communication_shares(json.loads(file.read_text()))
            print(f"  k = {k}: " + ", ".join(f"{n} {v:.1%}" for n, v in result[k].items()))
    return result


def measure_allreduce(options):
    with horovod_team(options) as team:
        # An all-reduce is over when the last worker has it.
        seconds = np.median(np.max(team.ask("allreduces", options.repeats), axis=0), axis=0)
    latency, bandwidth = fit_ring(WORKERS, BYTES, seconds)
    fitted = ring_seconds(WORKERS, np.array(BYTES), latency, bandwidth)
    print(f"all-reduce between {WORKERS} workers here, median of {options.repeats}, and the fit")
    for size, measured, model in zip(BYTES, 1e3 * seconds, 1e3 * fitted):
        print(f"  {size:>10,} bytes  {measured:9.3f} ms  {model:9.3f} ms")
    print(f"  alpha = {1e6 * latency:.0f} us a hop, B = {bandwidth / 1e9:.2f} GB/s")
    return {
        "bytes": BYTES,
        "seconds": seconds.tolist(),
        "fitted_seconds": fitted.tolist(),
        "latency_seconds": latency,
        "bytes_per_second": bandwidth,
    }


def parsed_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ("throughput", "timeline", "model")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--depth", type=int, default=8, help="of the CIFAR ResNet")
    parser.add_argument("--batch", type=int, default=32, help="images of its micro-step")
    parser.add_argument("--micro-steps", type=int, nargs="+", default=[1, 4], help="an update")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one timed window")
    parser.add_argument("--repeats", type=int, default=30, help="of each all-reduce")
    parser.add_argument("--gbits", type=float, nargs="+", default=[10, 25, 100])
    parser.add_argument("--hop-microseconds", type=float, default=20)
    parser.add_argument("--images-per-second", type=float, default=412, help="of one GPU")
    parser.add_argument("--micro-batch", type=int, default=32, help="of one GPU")
    parser.add_argument("--update-gbytes", type=float, default=700, help="a second, of one GPU")
    parser.add_argument("--json", type=output_file, help="file for all figures")
    parser.add_argument("--plot", type=output_file, help="file for the picture of the predictions")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parsed_options()
    if options.worker:
        return work(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # ends the workers too
    result = {"machine": machine()}
    print(f"{result['machine']['processor']}, {result['machine']['cores']} cores")
    if "throughput" in options.parts:
        result["throughput"] = measure_throughput(options)
    if "timeline" in options.parts:
        result["timeline"] = measure_timeline(options)
    if "model" in options.parts:
        result["allreduce"] = measure_allreduce(options)
        fixed = ring_seconds(WORKERS, 0, result["allreduce"]["latency_seconds"], np.inf)
        result["predictions"] = show_predictions(options, fixed)
        result["sharding"] = show_sharding(options, fixed)
        if options.plot:
            plot_predictions(options.plot, options, fixed)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
