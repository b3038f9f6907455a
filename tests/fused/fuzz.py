"""Calls the raw op with random good and bad arguments, for as long as you like.

    python -m tests.fused.fuzz --calls=1000000

The same as in the tests, for longer. Ends with an error at the first call that changes a variable
though it was refused; a crash of the process speaks for itself.
"""

import argparse
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from nlcg_tf.fused import nlcg_update
from tests.fused.raw_op import fuzz


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    library, reason = nlcg_update._load()
    if library is None:
        sys.exit(f"error: {reason}")
    done = refused = 0
    block = 10_000
    for start in range(0, arguments.calls, block):
        counts = fuzz(library, min(block, arguments.calls - start), arguments.seed + start)
        done, refused = done + counts[0], refused + counts[1]
        print(f"{start + block:,} calls: {done:,} done, {refused:,} refused", flush=True)


if __name__ == "__main__":
    main()
