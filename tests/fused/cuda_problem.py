"""The CUDA kernels as a plain library, and variables that it updates."""

import ctypes
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
RULES = ["fletcher_reeves", "polak_ribiere", "blended", "momentum"]
PRECONDITIONERS = [None, "bfgs", "normalized_bfgs", "given"]
# As in reference.py, which cannot be imported where there is no TensorFlow.
REALS = ["delta", "step_size", "beta", "curvature", "cosine", "gain_ratio", "preconditioner_mean"]
REALS += [
    "last_loss",
    "prediction_error",
    "predicted_change",
    "mean_squared_norm",
    "first_squared_norm",
]
REALS += ["mean_update_norm", "clip_factor"]


class Variant(NamedTuple):
    preconditioner: str | None = "bfgs"
    nesterov: bool = False
    scale: float | None = None  # that of a line search
    lars: float = 0.0
    decay: float = 0.0
    one_by_one: bool = False  # a call for each sweep


def _fields(kind, *names):
    return [(name, kind) for name in names]


class Settings(ctypes.Structure):
    """nlcg::Settings."""

    _fields_ = [
        *_fields(ctypes.c_int, "preconditioner", "rule", "searched"),
        *_fields(ctypes.c_bool, "nesterov"),
        *_fields(ctypes.c_double, "epsilon", "lars_coefficient", "momentum", "decay"),
    ]

    def __init__(self, rule, variant):
        super().__init__(
            preconditioner=PRECONDITIONERS.index(variant.preconditioner),
            nesterov=variant.nesterov,
            momentum=0.9,
            decay=0.99 if variant.preconditioner == "normalized_bfgs" else 1,
            rule=RULES.index(rule),
            searched=0 if variant.scale is None else 2,
            epsilon=1e-8,
            lars_coefficient=variant.lars,
        )


def build(emulate):
    """Builds the library; returns its path."""
    work = pathlib.Path(tempfile.mkdtemp())
    target = work / "libcheck.so"
    fused = ROOT / "nlcg_tf" / "fused"
    sources = [ROOT / "tests" / "fused" / "check_cuda.cu", fused / "nlcg_update_cuda.cu"]
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
    launch = r"(\w+(?:<[^<>]*>)?)[\s\\]*<<<([^<>]*)>>>\("
    text = re.sub(launch, r"emulation::Launch(\2, \1)(", source.read_text())
    assert "<<<" not in text, f"a launch in {source} has an unknown form"
    target = folder / f"{source.stem}.cc"
    target.write_text(text)
    return target


def precondition(g, w=None):
    """What the variant "given" computes outside of the kernels."""
    return g * np.resize(np.array([0.2, 1.2, 2.2], g.dtype), g.shape)


class Problem:
    """Variables of given sizes on the device, and the call that updates them."""

    def __init__(self, device, library, sizes, dtype, rule, variant):
        self.device, self.sizes, self.dtype = device, sizes, dtype
        rng = np.random.default_rng(0)
        # Where a variable is all zero LARS leaves its step alone.
        self.start = [rng.normal(size=n).astype(dtype) * (n != 1) for n in sizes]
        self.w = [device.put(x) for x in self.start]
        self.d, self.g_prev, self.g, self.preconditioned = (
            [device.put(np.zeros(n, dtype)) for n in sizes] for _ in range(4)
        )
        self.h = [device.put(np.ones(n, dtype)) for n in sizes]
        self.sums = device.put(np.full(4 * len(sizes), -1, dtype))
        self.ratios = device.put(np.ones(len(sizes), dtype))
        self.scale, searched = variant.scale, 0 if variant.scale is None else 2
        self.reals = device.put(np.zeros(len(REALS) + searched, dtype))
        self.counts = device.put(np.zeros(4, np.int64))
        self.given = device.put(np.zeros(3 + searched, dtype))
        self.decays = variant.decay * (1 + np.arange(len(sizes)) % 3)
        assert library.nlcg_settings_bytes() == ctypes.sizeof(Settings)
        self.settings = Settings(rule, variant)
        self.one_by_one = variant.one_by_one
        self.function = getattr(library, f"nlcg_update_{dtype}")
        self.function.restype = ctypes.c_char_p

    def update(self, fresh=True):
        pointer = lambda x: ctypes.c_void_p(self.device.pointer(x))  # noqa: E731
        lists = (self.w, self.d, self.h, self.g_prev, self.g, self.preconditioned)
        error = self.function(
            ctypes.byref(self.settings),
            ctypes.c_bool(fresh),
            ctypes.c_bool(self.one_by_one),
            len(self.sizes),
            *[(ctypes.c_void_p * len(xs))(*map(self.device.pointer, xs)) for xs in lists],
            pointer(self.ratios),
            pointer(self.sums),
            (ctypes.c_int64 * len(self.sizes))(*self.sizes),
            (ctypes.c_double * len(self.sizes))(*self.decays),
            *map(pointer, (self.given, self.reals, self.counts)),
        )
        assert not error, error.decode()

    def set(self, gradient, rate, loss):
        parts = np.split(gradient, np.cumsum(self.sizes)[:-1])
        given = np.split(precondition(gradient), np.cumsum(self.sizes)[:-1])
        scalars = [rate, rate, loss if self.settings.rule == RULES.index("blended") else 0]
        if self.scale is not None:
            scalars = [rate, rate * self.scale, loss, self.scale, loss]
        targets = [*self.g, *self.preconditioned, self.given]
        for target, value in zip(targets, [*parts, *given, scalars]):
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
