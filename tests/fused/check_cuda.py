"""Checks and times the CUDA kernels where there is no TensorFlow for GPUs: one command, one table.

    python -m tests.fused.check_cuda              needs a GPU, nvcc, and PyTorch or CuPy
    python -m tests.fused.check_cuda --emulate    needs g++: the kernels' logic on the CPU

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
import sys

# The oracle's dot products are short: further threads would only spin.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from tests.fused.cuda_problem import (
    REALS,
    RULES,
    Problem,
    Variant,
    build,
    precondition,
)
from tests.fused.devices import CuPy, Emulated, Torch
from tests.fused.times_cuda import show_times
from tests.support.oracle import Oracle

BOUNDS = {"float32": {**dict.fromkeys(RULES, 1e-5), "polak_ribiere": 1e-4}}
BOUNDS["float64"] = dict.fromkeys(RULES, 1e-12)


VARIANTS = [
    Variant(),
    Variant(scale=0.5),
    Variant(nesterov=True, scale=0.8, decay=0.5),
    Variant(lars=1.0),
    Variant(nesterov=True, lars=1.0, scale=0.8, decay=0.5),
    Variant(None, decay=0.5),
    Variant(None, nesterov=True, scale=0.5, lars=1.0),
    Variant("normalized_bfgs"),
    Variant("normalized_bfgs", nesterov=True, scale=0.5),
    Variant("normalized_bfgs", lars=1.0, decay=0.5),
    Variant(scale=0.5, decay=0.5, one_by_one=True),
    Variant("normalized_bfgs", nesterov=True, one_by_one=True),
    Variant(None, nesterov=True, one_by_one=True),
    Variant("given", decay=0.5),
    Variant("given", nesterov=True, lars=1.0, scale=0.5),
    Variant("given", nesterov=True, one_by_one=True),
]
# What is given goes with those rules that look at no step.
LOOK_BACK = ("polak_ribiere", "blended")
# Rule, variant, transfers of the parameter vector (nlcg_update.h).
# Sizes, updates, types, variants. More than 42 variables take several launches to fill the kernels'
# table. The last of each list have more chunks than there are threads to add them up.
BOTH = ["float32", "float64"]
CASES = [
    ([0, 0], 20, BOTH, VARIANTS),
    ([0, 1, 63], 20, BOTH, VARIANTS),
    ([64, 40_011, 0, 1], 20, BOTH, VARIANTS),
    ([300] * 161, 20, BOTH, VARIANTS),
    ([5_000_000], 5, ["float32"], VARIANTS[:4:3]),
]
EMULATED_CASES = [
    ([0, 0], 3, ["float32"], VARIANTS[::4]),
    ([0, 1, 63], 14, ["float32"], VARIANTS),
    ([64, 8193, 0, 1, 8192], 6, ["float64"], VARIANTS[1::2]),
    ([20] * 530, 2, ["float32"], VARIANTS[5:6]),
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


class GivenScale(Oracle):
    """With a line search outside of the kernels, whose scale stays as it is."""

    def _given(self, loss):
        self.previous_loss = loss


def expected_scalars(oracle):
    found = [getattr(oracle, name) for name in REALS]
    if oracle.line_search:
        found += [oracle.scale, oracle.previous_loss]
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
    preconditioner = variant.preconditioner
    settings = (
        rule,
        precondition if preconditioner == "given" else preconditioner,
        None if variant.scale is None else "given",
    )
    arguments = {"lars": variant.lars or None, "nesterov": variant.nesterov}
    oracle = GivenScale(start, sizes, *settings, **arguments)
    oracle.scale = variant.scale or 1.0
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
        variant = Variant(scale=0.5, lars=1.0)
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
    print(f"{'nesterov':<8} line search  LARS decay one by one update   scalars")
    for sizes, updates, types, variants in EMULATED_CASES if arguments.emulate else CASES:
        for dtype, (i, variant), rule in itertools.product(types, enumerate(variants), RULES):
            # In the emulation, which takes a second for each, half the cases: among the variants
            # each setting still meets each rule.
            if arguments.emulate and (i + RULES.index(rule)) % 2:
                continue
            if variant.preconditioner == "given" and rule in LOOK_BACK:
                continue
            name = str(sizes) if len(sizes) < 9 else f"{len(sizes)} x {sizes[0]}"
            name = f"{name:<28} {dtype:<8} {rule:<16} {variant.preconditioner!s:<16} "
            name += f"{variant.nesterov!s:<8} {variant.scale!s:<5} "
            name += f"{variant.lars:<4} {variant.decay:<5} {variant.one_by_one!s:<10} "
            try:
                update, scalars = check(device, library, sizes, updates, dtype, rule, variant)
            except AssertionError as error:
                show(f"{name}{error}", False)
                continue
            bound = BOUNDS[dtype][rule]
            good = update <= bound and scalars <= 10 * bound
            show(f"{name}{update:.2e} {scalars:.2e}", good)
    repeats, size = (3, 20_011) if arguments.emulate else (100, 278_011)
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
