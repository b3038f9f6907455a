"""Pure functions of scripts.bench.scaling and ring_model: rings, efficiency, traces, windows."""

import argparse

import numpy as np
import pytest

from scripts.bench import ring_model as model
from scripts.bench import scaling as bench

OPTIONS = argparse.Namespace(images_per_second=400, micro_batch=32, hop_microseconds=20)


def test_a_ring_of_one_worker_costs_nothing():
    assert model.ring_seconds(1, 1e8, 1e-3, 1e9) == 0
    assert model.predict(1, 1, 10, "float32", OPTIONS, fixed=1.0) == 1


def test_a_ring_by_hand():
    # 4 workers: 6 hops of 1 ms, and 6/4 of 8 MB at 1 GB/s.
    assert model.ring_seconds(4, 8e6, 1e-3, 1e9) == pytest.approx(6e-3 + 12e-3)


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_the_fit_finds_latency_and_bandwidth(workers):
    sizes = np.array(bench.BYTES)
    seconds = model.ring_seconds(workers, sizes, 3e-4, 1.7e9)
    assert model.fit_ring(workers, sizes, seconds) == pytest.approx((3e-4, 1.7e9))


def test_the_fit_finds_them_in_noise():
    sizes = np.tile(bench.BYTES, 50)
    noise = np.random.default_rng(0).normal(1, 0.05, len(sizes))
    seconds = model.ring_seconds(2, sizes, 3e-4, 1.7e9) * noise
    assert model.fit_ring(2, sizes, seconds) == pytest.approx((3e-4, 1.7e9), rel=0.02)


def test_efficiency():
    assert model.efficiency(1, 0.1, 0.0) == 1
    assert model.efficiency(1, 0.1, 0.1) == pytest.approx(1 / 2)
    assert model.efficiency(4, 0.1, 0.1) == pytest.approx(4 / 5)


@pytest.mark.parametrize("gbits", [10, 25, 100])
@pytest.mark.parametrize("gradients", model.GRADIENTS)
def test_predicted_efficiency_rises_with_micro_steps_and_falls_with_workers(gbits, gradients):
    def values(workers, micro_steps):
        return [
            model.predict(w, k, gbits, gradients, OPTIONS, 1e-3)
            for w in workers
            for k in micro_steps
        ]

    assert (np.diff(values([64], [1, 2, 4, 48])) > 0).all()
    assert (np.diff(values([1, 2, 64, 256, 1024], [4])) < 0).all()


def test_a_faster_network_and_smaller_gradients_raise_it():
    slow, fast = (model.predict(64, 1, gbits, "float32", OPTIONS, 0) for gbits in (10, 25))
    half = model.predict(64, 1, 10, "float16", OPTIONS, 0)
    assert slow < half < fast < 1


def test_micro_steps_of_the_large_batch():
    assert [model.needed_micro_steps(w, OPTIONS) for w in (64, 256, 1024)] == [48, 12, 3]


@pytest.mark.parametrize(
    "intervals, length",
    [
        ([], 0),
        ([(1, 2)], 1),
        ([(5, 6), (1, 2)], 2),
        ([(1, 4), (2, 3)], 3),  # one inside the other
        ([(1, 3), (2, 5), (5, 6)], 5),  # overlapping, and touching
        ([(1, 2)] * 60, 1),
    ],
)
def test_union_of_intervals(intervals, length):
    assert bench.covered(intervals) == length


def trace_of(updates, tensors=3):
    """A trace as Horovod writes it: updates are (request, all ready, transfer, copied, done)."""
    events = [{"name": "process_name", "ph": "M", "pid": 0, "args": {}}]
    for times in updates:
        names = ("NEGOTIATE_ALLREDUCE", None, "ALLREDUCE", "GLOO_ALLREDUCE", None, None)
        request, ready, transfer, copied, done = times
        for name, ts in zip(names, (request, ready, ready, transfer, copied, done)):
            event = {"ph": "B", "name": name} if name else {"ph": "E"}
            events += [{**event, "ts": ts, "pid": 1 + pid} for pid in range(tensors)]
    return events


def test_shares_of_a_trace():
    events = trace_of([(0, 50, 51, 52, 100), (160, 180, 184, 190, 200)])
    shares = bench.communication_shares(events)  # of the 100 us from 100 to 200
    assert shares == pytest.approx(
        {
            "communication": 0.40,
            "negotiation and waiting": 0.20,
            "exchange": 0.20,
            "transfer alone": 0.06,
        }
    )


def test_a_trace_that_begins_in_the_middle():
    events = [{"ph": "E", "ts": 1, "pid": 1}, *trace_of([(2, 3, 4, 5, 6)], tensors=1)]
    assert bench.trace_intervals(events)["ALLREDUCE"] == [(3, 6)]


def test_rates_count_only_the_time_in_which_all_work():
    slow, fast = [1.0, 2.0, 3.0, 4.0, 5.0], [1.5, 2.0, 2.5, 3.0, 3.5]
    assert bench.common_rates([slow, fast]) == pytest.approx([1, 2])
    # Both at the same pace, then the first one alone and twice as fast: that does not count.
    assert bench.common_rates([[0, 1, 2, 2.5, 3], [0, 1, 2]]) == pytest.approx([1, 1])


def test_rates_of_processes_that_never_met():
    with pytest.raises(RuntimeError, match="too busy"):
        bench.common_rates([[0, 1], [2, 3]])


def test_sharding_costs_its_small_sums_and_saves_what_others_do():
    # 1.6e9 bytes at 1e10 a second, of which 3/4 are done by others; 3 sums of 6 hops and 1 ms.
    found = model.sharding_seconds(4, 25_000_000, 1e10, latency=1e-4, fixed=1e-3)
    assert found == pytest.approx(3 * (6e-4 + 1e-3) - 0.75 * 0.16)
