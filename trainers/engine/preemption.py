"""SIGTERM, by which clusters take a machine back: the run saves its state and ends."""

import os
import signal

# The exit status of a run that was told to stop: the same command goes on where it stopped.
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h

_requested = False


def watch():
    """From now on SIGTERM is noted, and no longer ends the process at once.

    Not with elastic workers: there it takes one worker, and the others go on.
    """
    if os.environ.get("HOROVOD_ELASTIC") != "1" and not _requested:
        signal.signal(signal.SIGTERM, _note)


def requested():
    return _requested


def _note(number, frame):
    global _requested
    _requested = True
    # Nothing that comes later changes how the run ends, not even while Python itself ends.
    for later in (signal.SIGTERM, signal.SIGINT):
        signal.signal(later, signal.SIG_IGN)


class Preempted(Exception):
    """The run was told to stop, and its state is saved."""
