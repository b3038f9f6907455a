"""Runs all checks of the two files in one process: starting workers costs more than any of them."""

import sys
import traceback

import tensorflow as tf

import nlcg_tf.horovod as hvd
from tests.distributed import checks_fit, checks_updates


def main():
    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    assert hvd.size() == 2
    failed = False
    for name, check in {**vars(checks_updates), **vars(checks_fit)}.items():
        if name.startswith("check_"):
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
