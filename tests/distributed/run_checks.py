"""Runs all checks, or those named, in one process: starting workers costs more than any of them."""

import trainers.quick_start  # noqa: F401, I001

import sys
import traceback

import tensorflow as tf

import nlcg_tf.horovod as hvd
from tests.distributed import (
    checks_fit,
    checks_numbers,
    checks_refusals,
    checks_sharding,
    checks_updates,
)


def main():
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    assert hvd.size() == 2
    failed = False
    modules = (checks_updates, checks_numbers, checks_fit, checks_sharding, checks_refusals)
    checks = {name: check for module in modules for name, check in vars(module).items()}
    wanted = sys.argv[1:]
    for name, check in checks.items():
        if name in wanted or (name.startswith("check_") and not wanted):
            try:
                check()
                print("passed", name, flush=True)
            except Exception:
                failed = True
                print("failed", name, flush=True)
                traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    main()
