"""Names the workers that keep the others waiting."""

import contextlib
import os
import socket
import struct
import sys
import threading
import time

import horovod.tensorflow as hvd
import tensorflow as tf
from horovod.common.exceptions import HorovodInternalError

from nlcg_tf.configurable import check_number

# Key of the job, rank or `END`, steps, and moves; behind it the place, or why all are to end.
MESSAGE = struct.Struct("!16sqqq")
END = -1
A_STEP = "in a training step"
# Of the seconds without progress: other threads may need the interpreter for some hundredths.
LIMITS = 0.1, 1e6
# Where this worker is in its callbacks and operations, from the outermost to the innermost.
_places: list[str] = []
_moves = 0


@contextlib.contextmanager
def entering(place):
    """Context in which this worker waits for the others; a `Watch` compares where each does."""
    global _moves
    _places.append(place)
    _moves += 1
    try:
        yield
    finally:
        _places.pop()
        _moves += 1


@contextlib.contextmanager
def warning_after(seconds, text):
    """Context that says what may be wrong if it takes longer than so many seconds."""
    line = f"worker {hvd.rank()} waits for {seconds:g} s: {text}"
    timer = threading.Timer(seconds, _say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_communication_error(error):
    """Whether an exception comes from one of Horovod's operations."""
    if isinstance(error, HorovodInternalError):
        return True
    return isinstance(error, tf.errors.OpError) and "horovod" in str(error).lower()


class Watch:
    """Context that names workers that hang, on stderr.

    All workers must enter it together, and each must call `tick()` in every step:

    >>> with hvd.Watch() as watch:
    ...     for batch in data:
    ...         train_step(batch)
    ...         watch.tick()

    A worker that hangs causes a warning. If the count of worker 0 does not move for `seconds`, it
    names the workers that are behind (busy, or elsewhere in the program) and those that are silent
    (the process or the machine has stopped). Worker 1 does the same for worker 0. Both also report
    when the communication fails, as Gloo's does after 30 seconds of silence.

    If workers wait at different places of the program, they would wait forever. Then all workers
    report where they wait, and Horovod is shut down, which raises an error wherever they wait.
    Elastic workers only print the warning.

    A thread of each worker sends its count to worker 0 by UDP. Horovod 0.28's own stall check
    reports nothing under Gloo.

    Args:
        seconds: float, how long without a step before workers are named.

    Raises:
        ValueError: for seconds outside 0.1 to 1e6.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        check_number("seconds", seconds, *LIMITS)
        self.seconds = seconds
        self.beat = seconds / 6
        self.ticks = 0
        self.place = ""  # where this worker is, if that is a place in which it may wait

    def tick(self) -> None:
        """To be called in each step, by all workers alike."""
        self.ticks += 1

    def __enter__(self):
        self._rank = hvd.rank()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._socket.settimeout(self.beat)
        self._hosts = hvd.allgather_object(socket.gethostname())
        key, port = hvd.broadcast_object((os.urandom(16), self._socket.getsockname()[1]))
        self._key = key
        local = self._hosts[0] == self._hosts[self._rank]
        self._worker_0 = ("127.0.0.1" if local else self._hosts[0], port)
        now = time.monotonic()
        others = range(1, len(self._hosts)) if self._rank == 0 else [0]
        self._heard = dict.fromkeys(others, (now, 0))  # of each: when last, and its ticks
        self._stands = {}  # of each: since when, its moves, its place
        self._addresses = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        if is_communication_error(error):
            missing = self._missing()
            if missing:
                _say(f"communication failed: {missing}")
            elif self._rank > 0:
                # Worker 0 knows more, and the job ends with the first worker that leaves.
                time.sleep(self.beat)
        self._ended.set()
        with contextlib.suppress(OSError):  # wakes the thread, which waits for messages
            self._socket.sendto(b"", ("127.0.0.1", self._socket.getsockname()[1]))
        self._thread.join()
        self._socket.close()

    def _run(self):
        moved, ticks, sent = time.monotonic(), self.ticks, 0.0
        while not self._ended.is_set():
            now = time.monotonic()
            if self._rank > 0 and now - sent >= self.beat:
                sent = now
                self._send(self._worker_0)
            self._receive()
            if self._rank == 0:
                self._compare_places(now)
            if self.ticks != ticks:
                moved, ticks = now, self.ticks
            elif now - moved > self.seconds and self._rank < 2:
                missing = self._missing()
                if not missing and self._rank == 0 and (place := self._own_place()):
                    missing = (
                        f"all workers are {place}. A step takes long, or they wait for each other "
                        "in different operations"
                    )
                if missing:
                    _say(f"no progress for {now - moved:.0f} s: {missing}")
                moved = now

    def _send(self, address):
        with contextlib.suppress(OSError):  # a name that is not known yet, a full buffer
            message = MESSAGE.pack(self._key, self._rank, self.ticks, _moves)
            self._socket.sendto(message + self._own_place().encode(), address)

    def _own_place(self):
        return ": ".join(_places) or self.place

    def _receive(self):
        try:
            message, address = self._socket.recvfrom(2048)
            key, rank, ticks, moves = MESSAGE.unpack_from(message)
            text = message[MESSAGE.size :].decode(errors="replace")
        except (OSError, struct.error):
            return
        if key != self._key:
            return
        if rank == END:
            _say(text, "error")
            self._ended.set()
        elif rank in self._heard:
            self._heard[rank] = time.monotonic(), ticks
            self._note_place(rank, (ticks, moves), text)
            if self._rank == 0:
                self._addresses[rank] = address
                self._send(address)

    def _note_place(self, rank, count, place):
        if self._stands.get(rank, (0, None, None))[1:] != (count, place):
            self._stands[rank] = time.monotonic(), count, place

    def _compare_places(self, now):
        """On worker 0: ends all workers if some wait in different places."""
        self._note_place(0, (self.ticks, _moves), self._own_place())
        waiting = {
            rank: place
            for rank, (since, _, place) in sorted(self._stands.items())
            if place and now - since > self.seconds
        }
        if len(set(waiting.values())) < 2:
            return
        each = ", ".join(f"worker {rank} waits {place}" for rank, place in waiting.items())
        text = f"the workers wait for each other for ever: {each}"
        if os.environ.get("HOROVOD_ELASTIC") == "1":
            _say(text)
            self._stands.clear()
            return
        _say(text, "error")
        for address in self._addresses.values():
            with contextlib.suppress(OSError):
                message = MESSAGE.pack(self._key, END, 0, 0) + text.encode()
                self._socket.sendto(message, address)
        self._ended.set()
        time.sleep(1)  # so that all have said it before they end
        hvd.shutdown()

    def _missing(self):
        """The workers that this one waits for, in words; an empty string if there are none."""
        now, found = time.monotonic(), []
        for rank, (when, ticks) in sorted(self._heard.items()):
            name = f"worker {rank} on {self._hosts[rank]}"
            if now - when > 2.5 * self.beat:
                found.append(f"{name} is silent for {now - when:.0f} s")
            elif ticks < self.ticks:
                found.append(f"{name} is {self.ticks - ticks} step(s) behind or has ended")
        return ", ".join(found)


def _say(line, kind="warning"):
    print(f"{kind}: {line}", file=sys.stderr, flush=True)
