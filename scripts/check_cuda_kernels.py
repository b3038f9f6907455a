"""Checks and times the CUDA kernels where there is a GPU but no TensorFlow: one command, one table.

    python -m scripts.check_cuda_kernels

Needs nvcc, NumPy and PyTorch or CuPy. Builds the kernels as a plain library; compares 20 updates
with the float64 oracle of the tests for each rule, type and set of sizes; repeats one 100 times
and compares the bits; times an update of 100 million elements beside a device copy of as many bytes
and, with PyTorch, its fused Adam.

`--build_only` stops after the build, for a machine without a GPU.
"""

import argparse
import ctypes
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from oracle import Oracle  # noqa: E402

SIZES = [[0, 1, 63], [64, 278_011, 0, 1], [1000] * 161, [100_000_000]]
RULES = ["fletcher_reeves", "polak_ribiere"]
BOUNDS = {"float32": {"fletcher_reeves": 1e-5, "polak_ribiere": 1e-4}, "float64": 1e-12}
TRANSFERS = 16


def build():
    target = pathlib.Path(tempfile.mkdtemp(), "libcheck.so")
    fused = ROOT / "nlcg_tf" / "fused"
    sources = [ROOT / "scripts" / "check_cuda_kernels.cu", fused / "nlcg_update_cuda.cu"]
    options = ["-O3", "-std=c++17", "-fmad=false", "-shared", "-Xcompiler=-fPIC", f"-I{fused}"]
    targets = ["-gencode=arch=compute_80,code=sm_80"]
    targets.append("-gencode=arch=compute_90,code=[sm_90,compute_90]")
    subprocess.run(["nvcc", *options, *targets, *map(str, sources), "-o", str(target)], check=True)
    return target


class Torch:
    """Device memory and timing by PyTorch."""

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self.torch = torch

    def put(self, array):
        return self.torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def pointer(self, x):
        return x.data_ptr()

    def get(self, x):
        return x.cpu().numpy()

    def copy(self, to, source):
        to.copy_(source)

    def milliseconds(self, call):
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class CuPy:
    """Device memory and timing by CuPy."""

    def __init__(self):
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        self.cupy = cupy

    def put(self, array):
        return self.cupy.asarray(array)

    def pointer(self, x):
        return x.data.ptr

    def get(self, x):
        return self.cupy.asnumpy(x)

    def copy(self, to, source):
        to[...] = source

    def milliseconds(self, call):
        start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        return self.cupy.cuda.get_elapsed_time(start, end)


class Problem:
    """Variables of given sizes on the device, and the call that updates them."""

    def __init__(self, device, library, sizes, dtype, rule, preconditioner, line_search, lars=0.0):
        self.device, self.sizes, self.dtype = device, sizes, dtype
        rng = np.random.default_rng(0)
        self.start = [rng.normal(size=n).astype(dtype) for n in sizes]
        self.w = [device.put(x) for x in self.start]
        self.d, self.g_prev, self.g = (
            [device.put(np.zeros(n, dtype)) for n in sizes] for _ in range(3)
        )
        self.h = [device.put(np.ones(n, dtype)) for n in sizes]
        self.ratios = device.put(np.ones(len(sizes), dtype))
        reals = np.zeros(8, dtype)
        reals[5] = 1
        self.reals, self.counts = device.put(reals), device.put(np.zeros(4, np.int64))
        self.scalars = [device.put(np.zeros(1, dtype)) for _ in range(2)]
        self.flags = [
            int(preconditioner),
            RULES.index(rule),
            int(line_search),
            ctypes.c_double(lars),
        ]
        self.function = getattr(library, f"nlcg_update_{dtype}")
        self.function.restype = ctypes.c_char_p

    def _pointers(self, arrays):
        return (ctypes.c_void_p * len(arrays))(*[self.device.pointer(x) for x in arrays])

    def update(self):
        lists = (self.w, self.d, self.h, self.g_prev, self.g)
        scalars = [*self.scalars, self.reals, self.counts]
        error = self.function(
            len(self.sizes),
            *[self._pointers(arrays) for arrays in lists],
            ctypes.c_void_p(self.device.pointer(self.ratios)),
            (ctypes.c_int64 * len(self.sizes))(*self.sizes),
            *self.flags,
            *[ctypes.c_void_p(self.device.pointer(x)) for x in scalars],
            None,
        )
        if error:
            sys.exit(f"error: {error.decode()}")

    def set(self, gradients, rate, loss):
        for target, value in zip(self.g, gradients):
            self.device.copy(target, self.device.put(value.astype(self.dtype)))
        for target, value in zip(self.scalars, (rate, loss)):
            self.device.copy(target, self.device.put(np.full(1, value, self.dtype)))

    def weights(self):
        return np.concatenate([self.device.get(x) for x in self.w]).astype(np.float64)

    def bits(self):
        state = [*self.w, *self.d, *self.h, *self.g_prev, self.reals, self.counts]
        return b"".join(self.device.get(x).tobytes() for x in state)


def check(device, library, sizes, dtype, rule, preconditioner, line_search, lars=0.0):
    """Largest relative difference of an update to the oracle's over 20 updates."""
    problem = Problem(device, library, sizes, dtype, rule, preconditioner, line_search, lars)
    oracle = Oracle(
        np.concatenate(problem.start).astype(np.float64),
        sizes,
        rule,
        preconditioner,
        "online" if line_search else None,
        lars=lars or None,
    )
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, size=sum(sizes))
    worst = 0.0
    updates = 20 if sum(sizes) < 10_000_000 else 3
    for t in range(updates):
        before, oracle_before = problem.weights(), oracle.w.copy()
        gradient = (scale * before + 0.05 * rng.normal(size=sum(sizes))).astype(dtype)
        rate = float(np.asarray(0.05, dtype))
        loss = float(np.asarray(2 + 0.3 * np.sin(t), dtype))
        problem.set(np.split(gradient, np.cumsum(sizes)[:-1]), rate, loss)
        problem.update()
        oracle.update(gradient, loss, rate)
        update, expected = problem.weights() - before, oracle.w - oracle_before
        worst = max(worst, np.linalg.norm(update - expected) / np.linalg.norm(expected))
    # A gradient that is not finite is skipped.
    before = problem.bits()[: -4 * 8]
    gradient[-1] = np.nan
    problem.set(np.split(gradient, np.cumsum(sizes)[:-1]), rate, loss)
    kept = problem.weights()
    problem.update()
    assert np.array_equal(problem.weights(), kept), "a NaN changed the weights"
    assert problem.bits()[: -4 * 8] == before, "a NaN changed the state"
    return worst


def check_repeats(device, library, rule):
    """100 times the same three updates: the bits must be the same each time."""
    seen = set()
    for _ in range(100):
        problem = Problem(device, library, [278_011, 63, 4096], "float32", rule, True, True)
        rng = np.random.default_rng(2)
        for _ in range(3):
            problem.set([rng.normal(size=n) for n in problem.sizes], 0.05, 1.0)
            problem.update()
        seen.add(problem.bits())
    return len(seen)


def times(device, library):
    """Milliseconds of an update of 100 million floats, and of what it is compared with."""
    size = 100_000_000
    problem = Problem(device, library, [size], "float32", "fletcher_reeves", True, False)
    problem.set([np.full(size, 0.01)], 1e-4, 1.0)
    target, source = (device.put(np.zeros(size * TRANSFERS // 2, np.float32)) for _ in range(2))
    calls = {
        "NLCG update": problem.update,
        "device copy of the same bytes": lambda: device.copy(target, source),
    }
    if isinstance(device, Torch):
        parameter = device.torch.nn.Parameter(device.put(np.ones(size, np.float32)))
        parameter.grad = device.put(np.full(size, 0.01, np.float32))
        calls["PyTorch fused Adam"] = device.torch.optim.Adam([parameter], fused=True).step
    found = {name: [] for name in calls}
    for repeat in range(23):
        for name, call in calls.items():
            elapsed = device.milliseconds(call)
            if repeat >= 3:
                found[name].append(elapsed)
    return size, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build_only", action="store_true")
    arguments = parser.parse_args()
    library = build()
    print(f"built {library}")
    if arguments.build_only:
        return
    for kind in (Torch, CuPy):
        try:
            device = kind()
            break
        except Exception as error:
            print(f"{kind.__name__}: {error}")
    else:
        sys.exit("error: no GPU through PyTorch or CuPy")
    library = ctypes.CDLL(str(library))
    print(f"{'sizes':<28} {'type':<8} {'rule':<16} h  ls lars   difference  bound")
    failed = False
    for sizes in SIZES:
        for dtype in ("float32",) if sum(sizes) > 10_000_000 else ("float32", "float64"):
            bounds = BOUNDS[dtype]
            for rule in RULES:
                bound = bounds[rule] if isinstance(bounds, dict) else bounds
                variants = [(True, True, 0.0), (False, False, 0.0), (True, False, 0.02)]
                for preconditioner, line_search, lars in variants:
                    worst = check(
                        device, library, sizes, dtype, rule, preconditioner, line_search, lars
                    )
                    failed |= not worst <= bound
                    name = str(sizes) if len(sizes) < 9 else f"{len(sizes)} x {sizes[0]}"
                    verdict = "" if worst <= bound else "  FAILED"
                    print(
                        f"{name:<28} {dtype:<8} {rule:<16} {preconditioner:d}  {line_search:d}  "
                        f"{lars:<5}  {worst:.2e}    {bound:.0e}{verdict}"
                    )
    for rule in RULES:
        kinds = check_repeats(device, library, rule)
        failed |= kinds != 1
        print(f"100 repeats, {rule}: {kinds} kind(s) of bits")
    size, found = times(device, library)
    moved = TRANSFERS * 4 * size
    for name, milliseconds in found.items():
        low, median, high = np.percentile(milliseconds, [0, 50, 100])
        share = f"{moved / median / 1e6:,.0f} GB/s" if "Adam" not in name else ""
        print(f"{size:,} floats: {name:<30} {median:.3f} ms ({low:.3f} to {high:.3f}) {share}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
