"""Checks and times the CUDA kernels where there is no TensorFlow for GPUs: one command, one table.

    python -m scripts.check_cuda_kernels              needs a GPU, nvcc, and PyTorch or CuPy
    python -m scripts.check_cuda_kernels --emulate    needs g++: the kernels' logic on the CPU

Builds the kernels as a plain library; compares weights, scalars, counts and LARS factors with the
float64 oracle of the tests after each update, for the rules, types, sizes and settings listed
below; feeds values that are not finite in between; repeats an update 100 times and compares the
bits; times updates of 100 million elements beside a device copy of as many bytes and, with
PyTorch, its fused Adam.

`--emulate` builds the same source for tests/fused/cuda_emulation.h: fewer elements, no times.
`--build_only` stops after the build, for a machine without a GPU.
"""

import argparse
import ctypes
import itertools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

# The oracle's dot products are short: further threads would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))

import numpy as np
from oracle import STEP_FACTORS, Oracle

ROOT = pathlib.Path(__file__).parents[1]
RULES = ["fletcher_reeves", "polak_ribiere", "blended"]
PRECONDITIONERS = [None, "bfgs", "normalized_bfgs", "rms"]
LINE_SEARCHES = [None, "online", "step"]
BOUNDS = {"float32": {"fletcher_reeves": 1e-5, "polak_ribiere": 1e-4, "blended": 1e-5}}
BOUNDS["float64"] = dict.fromkeys(RULES, 1e-12)
# As in composed.py, which cannot be imported where there is no TensorFlow.
REALS = ["delta", "step_size", "beta", "curvature", "cosine", "kappa", "preconditioner_mean"]
REALS += ["tested_loss", "left_over", "foretold", "mean_square", "first_square"]
REALS += ["mean_length", "cap"]


class Variant(NamedTuple):
    preconditioner: str | None = "bfgs"
    nesterov: bool = False
    line_search: str | None = None
    lars: float = 0.0
    decay: float = 0.0


VARIANTS = [
    Variant(),
    Variant(line_search="online"),
    Variant(nesterov=True, line_search="step", decay=0.5),
    Variant(lars=1.0),
    Variant(nesterov=True, lars=1.0, line_search="step", decay=0.5),
    Variant(None, decay=0.5),
    Variant(None, nesterov=True, line_search="online", lars=1.0),
    Variant("normalized_bfgs"),
    Variant("normalized_bfgs", nesterov=True, line_search="online"),
    Variant("normalized_bfgs", lars=1.0, decay=0.5),
    Variant("rms"),
    Variant("rms", nesterov=True, lars=1.0, decay=0.5),
]
# Rule, variant, transfers of the parameter vector (nlcg_update.h).
TIMED = [
    ("fletcher_reeves", Variant(), 14),
    ("blended", Variant("normalized_bfgs", nesterov=True), 16),
    ("fletcher_reeves", Variant("rms"), 9),
    ("blended", Variant("rms", nesterov=True), 12),
]
# Sizes, updates, types, variants. More than 46 variables take several launches to fill the kernels'
# table. The last of each list have more chunks than there are threads to add them up.
BOTH = ["float32", "float64"]
CASES = [
    ([0, 0], 20, BOTH, VARIANTS),
    ([0, 1, 63], 20, BOTH, VARIANTS),
    ([64, 278_011, 0, 1], 20, BOTH, VARIANTS),
    ([1000] * 161, 20, BOTH, VARIANTS),
    ([100_000_000], 5, ["float32"], VARIANTS[:4:3]),
]
EMULATED_CASES = [
    ([0, 0], 3, ["float32"], VARIANTS),
    ([0, 1, 63], 18, ["float32"], VARIANTS),
    ([64, 8193, 0, 1, 8192], 18, ["float64"], VARIANTS),
    ([20] * 530, 3, ["float32"], VARIANTS[5:6]),
]
# Gradients that grow downhill: their curvature is rejected, and beta is not 0 by either rule.
GROWTH = {5: 1.2, 6: 2}
# What is not finite in which update. The loss matters only to a line search.
SPOILED = {
    0: ("gradient", np.nan),
    3: ("loss", np.nan),
    8: ("gradient", np.inf),
    9: ("gradient", -np.inf),
    12: ("loss", -np.inf),
    13: ("rate", np.inf),
}


def _fields(kind, *names):
    return [(name, kind) for name in names]


class Settings(ctypes.Structure):
    """nlcg::Settings."""

    _fields_ = [
        *_fields(ctypes.c_int, "preconditioner", "rule", "line_search"),
        *_fields(ctypes.c_bool, "nesterov"),
        *_fields(ctypes.c_double, "epsilon", "lars_coefficient", "momentum", "decay"),
        *_fields(ctypes.c_double, "decrease_threshold", "increase_threshold", "decrease_factor"),
        *_fields(ctypes.c_int, "period", "limit_count"),
        *_fields(ctypes.c_double, "smoothing"),
        *_fields(ctypes.c_double * 16, "limits", "factors"),
        *_fields(ctypes.c_double, "increase_factor", "minimum_scale"),
    ]

    def __init__(self, rule, variant):
        limits, factors = zip(*STEP_FACTORS)
        super().__init__(
            preconditioner=PRECONDITIONERS.index(variant.preconditioner),
            nesterov=variant.nesterov,
            momentum=0.9,
            decay=0.99 if variant.preconditioner in ("normalized_bfgs", "rms") else 1,
            rule=RULES.index(rule),
            line_search=LINE_SEARCHES.index(variant.line_search),
            epsilon=1e-8,
            lars_coefficient=variant.lars,
            decrease_threshold=0.02,
            increase_threshold=0.01,
            decrease_factor=0.975,
            period=5,
            limit_count=len(STEP_FACTORS),
            smoothing=0.7,
            limits=limits,
            factors=factors,
            increase_factor=1.05 if variant.line_search == "step" else 1.025,
            minimum_scale=1e-4,
        )


def build(emulate):
    """Builds the library; returns its path."""
    work = pathlib.Path(tempfile.mkdtemp())
    target = work / "libcheck.so"
    fused = ROOT / "nlcg_tf" / "fused"
    sources = [ROOT / "scripts" / "check_cuda_kernels.cu", fused / "nlcg_update_cuda.cu"]
    if emulate:
        shutil.copy(ROOT / "tests" / "fused" / "cuda_emulation.h", work / "cuda_runtime.h")
        sources = [_without_launches(source, work) for source in sources]
        # A fortified longjmp takes the stack of another fiber for an error.
        options = ["-O2", "-std=c++17", "-ffp-contract=off", "-U_FORTIFY_SOURCE", f"-I{work}"]
        command = [*shlex.split(os.environ.get("CXX", "g++")), *options, "-shared", "-fPIC"]
    else:
        command = ["nvcc", "-O3", "-std=c++17", "-fmad=false", "-shared", "-Xcompiler=-fPIC"]
        command.append("-gencode=arch=compute_80,code=sm_80")
        command.append("-gencode=arch=compute_90,code=[sm_90,compute_90]")
    subprocess.run([*command, f"-I{fused}", *map(str, sources), "-o", str(target)], check=True)
    return target


def _without_launches(source, folder):
    """A copy of CUDA source whose launches, which are not C++, are calls of the emulation."""
    launch = r"(\w+(?:<[^<>]*>)?)<<<([^<>]*)>>>\("
    text = re.sub(launch, r"emulation::Launch(\2, \1)(", source.read_text())
    assert "<<<" not in text, f"a launch in {source} has an unknown form"
    target = folder / f"{source.stem}.cc"
    target.write_text(text)
    return target


class Torch:
    """Device memory and timing by PyTorch."""

    def __init__(self):
        import torch

        if not torch.cuda.is_available():
            raise ImportError("PyTorch sees no GPU")
        self.torch = torch
        self.event = lambda: torch.cuda.Event(enable_timing=True)
        self.elapsed = lambda start, end: start.elapsed_time(end)

    def put(self, array):
        return self.torch.from_numpy(np.ascontiguousarray(array)).cuda()

    def pointer(self, x):
        return x.data_ptr()

    def get(self, x):
        return x.cpu().numpy()


class CuPy:
    """Device memory and timing by CuPy."""

    def __init__(self):
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        self.cupy = cupy
        self.event = cupy.cuda.Event
        self.elapsed = cupy.cuda.get_elapsed_time

    def put(self, array):
        return self.cupy.asarray(array)

    def pointer(self, x):
        return x.data.ptr

    def get(self, x):
        return self.cupy.asnumpy(x)


class Emulated:
    """Memory of the CPU. Around each array lie bytes which read as NaN, and which must stay."""

    MARGIN = 64

    def put(self, array):
        memory = np.full(array.nbytes + 2 * self.MARGIN, 255, np.uint8)
        x = memory[self.MARGIN : -self.MARGIN].view(array.dtype)
        x[...] = array
        return x

    def pointer(self, x):
        return x.ctypes.data

    def get(self, x):
        margins = x.base[: self.MARGIN], x.base[-self.MARGIN :]
        assert np.all(np.equal(margins, 255)), "a kernel wrote beyond an array"
        return x.copy()


class Problem:
    """Variables of given sizes on the device, and the call that updates them."""

    def __init__(self, device, library, sizes, dtype, rule, variant):
        self.device, self.sizes, self.dtype = device, sizes, dtype
        rng = np.random.default_rng(0)
        # Where a variable is all zero LARS leaves its step alone.
        self.start = [rng.normal(size=n).astype(dtype) * (n != 1) for n in sizes]
        self.w = [device.put(x) for x in self.start]
        self.d, self.g_prev, self.g = (
            [device.put(np.zeros(n, dtype)) for n in sizes] for _ in range(3)
        )
        initial = 0 if variant.preconditioner == "rms" else 1
        self.h = [device.put(np.full(n, initial, dtype)) for n in sizes]
        self.sums = device.put(np.full(4 * len(sizes), -1, dtype))
        self.ratios = device.put(np.ones(len(sizes), dtype))
        searched = [1, 0, 0][: [0, 2, 3][LINE_SEARCHES.index(variant.line_search)]]
        self.reals = device.put(np.array([*[0] * len(REALS), *searched], dtype))
        self.counts = device.put(np.zeros(4, np.int64))
        self.rate, self.loss = (device.put(np.zeros(1, dtype)) for _ in range(2))
        self.decays = variant.decay * (1 + np.arange(len(sizes)) % 3)
        assert library.nlcg_settings_bytes() == ctypes.sizeof(Settings)
        self.settings = Settings(rule, variant)
        self.function = getattr(library, f"nlcg_update_{dtype}")
        self.function.restype = ctypes.c_char_p

    def update(self, fresh=True):
        pointer = lambda x: ctypes.c_void_p(self.device.pointer(x))  # noqa: E731
        lists = (self.w, self.d, self.h, self.g_prev, self.g)
        error = self.function(
            ctypes.byref(self.settings),
            ctypes.c_bool(fresh),
            len(self.sizes),
            *[(ctypes.c_void_p * len(xs))(*map(self.device.pointer, xs)) for xs in lists],
            pointer(self.ratios),
            pointer(self.sums),
            (ctypes.c_int64 * len(self.sizes))(*self.sizes),
            (ctypes.c_double * len(self.sizes))(*self.decays),
            *map(pointer, (self.rate, self.loss, self.reals, self.counts)),
        )
        assert not error, error.decode()

    def set(self, gradient, rate, loss):
        parts = np.split(gradient, np.cumsum(self.sizes)[:-1])
        for target, value in zip([*self.g, self.rate, self.loss], [*parts, [rate], [loss]]):
            target[...] = self.device.put(np.asarray(value, self.dtype))

    def weights(self):
        return np.concatenate([self.device.get(x) for x in self.w]).astype(np.float64)

    def scalars(self):
        """Reals, and the LARS factors of the variables that have elements."""
        factors = self.device.get(self.ratios)[np.array(self.sizes) > 0]
        return np.concatenate([self.device.get(self.reals), factors]).astype(np.float64)

    def bits(self):
        state = [*self.w, *self.d, *self.h, *self.g_prev, self.reals, self.ratios, self.sums]
        return b"".join(self.device.get(x).tobytes() for x in state)


def expected_scalars(oracle):
    found = [getattr(oracle, name) for name in REALS]
    if oracle.line_search == "online":
        found += [oracle.scale, oracle.previous_loss]
    elif oracle.line_search == "step":
        found += [oracle.scale, oracle.ema, oracle.ema_compared]
    starts = np.cumsum([0, *oracle.sizes[:-1]])[np.array(oracle.sizes) > 0]
    # Without elements there is no angle.
    return np.nan_to_num(np.concatenate([found, oracle.alpha[starts] / oracle.step_size]))


def check(device, library, sizes, updates, dtype, rule, variant):
    """Compares each update with the oracle's.

    Returns:
        Largest relative difference of an update, and of a scalar.
    """
    problem = Problem(device, library, sizes, dtype, rule, variant)
    start = np.concatenate(problem.start).astype(np.float64)
    settings = (rule, variant.preconditioner, variant.line_search)
    oracle = Oracle(start, sizes, *settings, lars=variant.lars or None, nesterov=variant.nesterov)
    decays = np.repeat(problem.decays, sizes)
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, size=len(start))
    worst = np.zeros(2)
    for t in range(updates):
        before, oracle_before = problem.weights(), oracle.w.copy()
        bits = problem.bits() if t in SPOILED else None
        gradient = (scale * before + 0.05 * rng.normal(size=len(start))).astype(dtype)
        gradient *= GROWTH.get(t, 1)
        loss = 1 + np.sum(scale * before**2) / 2
        loss *= 1 + 0.1 * (t % 5 == 4) + 0.002 * t * rng.normal()
        inputs = {"rate": 0.05 / (1 + 0.1 * t), "loss": loss}
        what, value = SPOILED.get(t, (None, None))
        if what == "gradient":
            gradient[rng.integers(max(1, len(start))) :][:1] = value
        elif what:
            inputs[what] = value
        rate, loss = (float(np.asarray(inputs[name], dtype)) for name in ("rate", "loss"))
        problem.set(gradient, rate, loss)
        problem.update()
        skipped = oracle.skipped
        if np.isfinite(rate):
            with np.errstate(invalid="ignore"):
                oracle.update(gradient, loss, rate, decays)
        else:
            oracle.skipped += 1  # the oracle trusts the rate
        applied = oracle.skipped == skipped
        counts = device.get(problem.counts).tolist()
        expected = [oracle.updates, oracle.skipped, oracle.rejected, int(applied)]
        assert counts == expected, f"update {t}: counts {counts}, expected {expected}"
        if not applied:
            assert problem.bits() == bits, f"update {t} was skipped, and changed the state"
            continue
        # Where there are no elements, or beta is 0, nothing is left to divide by.
        update, expected = problem.weights() - before, oracle.w - oracle_before
        difference = np.linalg.norm(update - expected) / (np.linalg.norm(expected) or 1)
        expected = expected_scalars(oracle)
        apart = np.abs(problem.scalars() - expected) / np.where(expected, np.abs(expected), 1)
        worst = np.maximum(worst, [difference, np.max(apart)])
    return worst


def check_repeats(device, library, rule, repeats, size):
    """Does the same three updates again and again; returns how many kinds of bits came out."""
    seen = set()
    for _ in range(repeats):
        variant = Variant(line_search="online", lars=1.0)
        problem = Problem(device, library, [size, 63, 4096], "float32", rule, variant)
        rng = np.random.default_rng(2)
        for _ in range(3):
            problem.set(rng.normal(size=sum(problem.sizes)), 0.05, 1.0)
            problem.update()
        seen.add(problem.bits())
    return len(seen)


def count_launches(device, library, lars):
    """Launches of an update of 161 variables, in the emulation."""
    problem = Problem(device, library, [1] * 161, "float32", RULES[0], Variant(lars=lars))
    launches = ctypes.c_int.in_dll(library, "emulation_launches")
    before = launches.value
    problem.update()
    return launches.value - before


def times(device, library, rule, variant, transfers):
    """Milliseconds of an update of 100 million floats, and of what it is compared with."""
    size = 100_000_000
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
    found = {name: [] for name in calls}
    for repeat in range(23):
        # A convex problem: an update whose curvature is rejected does not write h.
        problem.g[0] *= 0.99
        for name, call in calls.items():
            start, end = device.event(), device.event()
            start.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= 3:
                found[name].append(device.elapsed(start, end))
    assert device.get(problem.counts).tolist() == [23, 0, 0, 1], "not all updates were whole"
    return size, found


def show_times(device, library):
    for rule, variant, transfers in TIMED:
        size, found = times(device, library, rule, variant, transfers)
        moved = transfers * 4 * size
        print(f"{size:,} floats, {variant.preconditioner}, {rule}, nesterov={variant.nesterov}")
        for name, milliseconds in found.items():
            low, median, high = np.percentile(milliseconds, [0, 50, 100])
            share = f"{moved / median / 1e6:,.0f} GB/s" if "Adam" not in name else ""
            print(f"  {name:<30} {median:.3f} ms ({low:.3f} to {high:.3f}) {share}")


def gpu():
    for kind in (Torch, CuPy):
        try:
            return kind()
        except Exception as error:
            print(f"{kind.__name__}: {error}")
    sys.exit("error: no GPU through PyTorch or CuPy")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--build_only", action="store_true")
    parser.add_argument("--emulate", action="store_true")
    arguments = parser.parse_args()
    path = build(arguments.emulate)
    print(f"built {path}")
    if arguments.build_only:
        return
    device = Emulated() if arguments.emulate else gpu()
    library = ctypes.CDLL(str(path))
    failures = 0

    def show(name, good):
        nonlocal failures
        failures += not good
        print(name if good else f"{name}  FAILED", flush=True)

    print(f"{'sizes':<28} {'type':<8} {'rule':<16} {'preconditioner':<16} ", end="")
    print(f"{'nesterov':<8} line search  LARS decay   update   scalars")
    for sizes, updates, types, variants in EMULATED_CASES if arguments.emulate else CASES:
        for dtype, rule, variant in itertools.product(types, RULES, variants):
            name = str(sizes) if len(sizes) < 9 else f"{len(sizes)} x {sizes[0]}"
            name = f"{name:<28} {dtype:<8} {rule:<16} {variant.preconditioner!s:<16} "
            name += f"{variant.nesterov!s:<8} {variant.line_search!s:<12} "
            name += f"{variant.lars:<4} {variant.decay:<5}  "
            try:
                update, scalars = check(device, library, sizes, updates, dtype, rule, variant)
            except AssertionError as error:
                show(f"{name}{error}", False)
                continue
            bound = BOUNDS[dtype][rule]
            good = update <= bound and scalars <= 10 * bound
            show(f"{name}{update:.2e} {scalars:.2e}", good)
    repeats, size = (10, 20_011) if arguments.emulate else (100, 278_011)
    for rule in RULES:
        kinds = check_repeats(device, library, rule, repeats, size)
        show(f"{repeats} repeats, {rule}: {kinds} kind(s) of bits", kinds == 1)
    if arguments.emulate:
        for lars, most in ((0.0, 10), (1.0, 12)):
            launches = count_launches(device, library, lars)
            show(f"161 variables, LARS {lars}: {launches} launches", launches <= most)
    else:
        show_times(device, library)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
