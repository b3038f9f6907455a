"""horovodrun but for its question whether Horovod has Gloo, for which it imports TensorFlow.

python tests/support/horovodrun.py --gloo -np 2 COMMAND
"""

import sys

from horovod.runner import launch

if __name__ == "__main__":
    launch.gloo_built = lambda verbose=False: True
    sys.exit(launch.run_commandline())
