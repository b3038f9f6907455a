"""horovodrun, without two things that cost more than what the tests do.

It imports TensorFlow to ask whether Horovod has Gloo, and starts two Python processes a second to
run the script that discovers hosts.

python tests/support/horovodrun.py --gloo -np 2 COMMAND
"""

import subprocess
import sys


def _discover(self):
    return subprocess.check_output(self._discovery_script, shell=True, text=True)


if __name__ == "__main__":
    # Not above: the processes in between, which multiprocessing spawns, import this file too.
    from horovod.runner import launch
    from horovod.runner.elastic.discovery import HostDiscoveryScript

    launch.gloo_built = lambda verbose=False: True
    HostDiscoveryScript._execute_discovery_script = _discover
    sys.exit(launch.run_commandline())
