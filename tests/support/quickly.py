"""Runs a program as `python FILE ARGUMENTS` would, with the trainers' quick import of TensorFlow.

python tests/support/quickly.py FILE ARGUMENTS
"""

import os
import runpy
import sys

from trainers.engine.imports import import_tensorflow

if __name__ == "__main__":
    import_tensorflow()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
