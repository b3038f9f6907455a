"""Runs the trainings of a sweep as child processes, and records how each ends."""

import contextlib
import ctypes
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from tqdm import tqdm

from scripts.shared import runs
from trainers.engine import files
from trainers.engine.files import write
from trainers.engine.folder import CHECKPOINTS, SUMMARY, read_json
from trainers.engine.preemption import EXIT_STATUS as SAVED

ROOT = pathlib.Path(__file__).parents[2]
LOG_LINES = 15
# Ends of a run that are no fault of its own; launchers give 128 + the signal. SIGKILL is not among
# them: it is how Linux ends what takes too much memory.
FROM_OUTSIDE = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
INTERRUPTED = {SAVED, *(-s for s in FROM_OUTSIDE), *(128 + s for s in FROM_OUTSIDE)}
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class Sweep:
    """The runs of one folder while they run.

    Args:
        folder: path of the sweep's folder.
        runs: dict as of `scripts.sweep.definition.expand`.
        jobs: int, runs at once, each on its own share of the cores.
        discard_checkpoints: whether a run that has finished loses its checkpoints.
    """

    def __init__(self, folder, runs, jobs=1, discard_checkpoints=False):
        self.folder = folder
        self.runs = runs
        self.discard_checkpoints = discard_checkpoints
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(cores):
            raise ValueError(f"--jobs must be 1 to {len(cores)}, the cores here. Received: {jobs}")
        bounds = [len(cores) * i // jobs for i in range(jobs + 1)]
        self._free = [cores[a:b] for a, b in itertools.pairwise(bounds)]
        self._share = jobs > 1
        self._running = {}
        self.told = None

    def run_folder(self, name):
        return self.folder / "runs" / name

    def status(self, name):
        return runs.status(self.run_folder(name))

    def run(self, retry_failed=False):
        """Runs what has not ended yet, and says how all have ended.

        Returns:
            The exit status of the sweep, see `scripts.sweep`.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        start = ("unfinished", "failed") if retry_failed else ("unfinished",)
        waiting = [name for name in self.runs if self.status(name) in start]
        print(f"{len(self.runs)} runs, {len(self.runs) - len(waiting)} done before", flush=True)
        for name in self.runs:
            self._discard(name)
        self._run(waiting)
        self._write_table()
        statuses = [self.status(name) for name in self.runs]
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in runs.STATUSES if s in statuses)
        print(f"{counts}: {self.folder / 'runs.csv'}")
        if "failed" in statuses:
            print("--retry-failed starts the failed ones again")
        if self.told:
            print("stopped: the same command goes on")
            return SAVED if self.told == signal.SIGTERM else 128 + self.told
        return int("failed" in statuses or "unfinished" in statuses)

    def _run(self, waiting):
        with tqdm(total=len(waiting), unit="run", disable=None) as bar:
            while self._running or (waiting and not self.told):
                while waiting and self._free and not self.told:
                    self._start(waiting.pop(0))
                    bar.set_postfix_str(", ".join(self._running))
                for name in [n for n, run in self._running.items() if run[0].poll() is not None]:
                    self._end(name)
                    bar.set_postfix_str(", ".join(self._running))
                    bar.update()
                time.sleep(0.1)

    def _write_table(self):
        # The tasks of a SLURM array write it too: none may replace a newer view by its own.
        with files.lock(self.folder / ".table.lock", wait=True):
            runs.write_csv(runs.read_runs([self.folder]), self.folder / "runs.csv")

    def _discard(self, name):
        if self.discard_checkpoints and self.status(name) in ("finished", "diverged"):
            shutil.rmtree(self.run_folder(name) / CHECKPOINTS, ignore_errors=True)

    def _start(self, name):
        folder, cores = self.run_folder(name), self._free.pop(0)
        folder.mkdir(parents=True, exist_ok=True)
        wait_until_free(folder)
        (folder / runs.FAILED_FILE).unlink(missing_ok=True)
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
        if self._share:
            environment["TF_NUM_INTRAOP_THREADS"] = str(len(cores))
        parent = os.getpid()

        def prepare():
            os.sched_setaffinity(0, cores)
            # If the sweep is killed its runs end too: they would keep their folders locked.
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen(
                command(self.runs[name], folder),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the sweep alone
                preexec_fn=prepare,
            )
        self._running[name] = process, cores, time.monotonic()
        if self.told:  # in these milliseconds
            process.terminate()

    def _end(self, name):
        """Records and tells how a run has ended."""
        process, cores, began = self._running.pop(name)
        self._free.append(cores)
        folder, code = self.run_folder(name), process.returncode
        interrupted = code and (self.told or code in INTERRUPTED)
        if not interrupted and (code or runs.status(folder) == "unfinished"):
            write(folder / runs.FAILED_FILE, json.dumps({"exit_status": code}) + "\n")
        status = runs.status(folder)
        line = f"{name}: {status} after {time.monotonic() - began:.0f} s"
        if status in ("finished", "diverged"):
            line += f", top-1 {read_json(folder / SUMMARY)['top1']:.2%}"
        elif status == "unfinished":
            line += f" (exit status {code}): the same command goes on"
        else:
            tail = (folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
            line += f" (exit status {code}); {folder / 'log.txt'} ends with"
            line = "\n    ".join([line, *tail])
        tqdm.write(line)
        sys.stdout.flush()
        self._discard(name)
        self._write_table()

    def _stop(self, number, frame):
        """The first signal lets the runs save their state, the second kills them."""
        again, self.told = self.told, number
        for process, *_ in list(self._running.values()):
            if not again:
                process.terminate()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def wait_until_free(folder, seconds=30):
    """Waits for the last run in a folder: a launcher's workers outlive a killed sweep a little."""
    lock = folder / ".lock"
    for _ in range(10 * seconds):
        if not lock.exists():
            return
        with contextlib.suppress(BlockingIOError):
            files.lock(lock).close()
            return
        time.sleep(0.1)


def command(run, folder):
    """The command of a run, as a list of words."""
    flags = {**run["flags"], "output_dir": folder}
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [*run["launcher"], sys.executable, "-m", run["trainer"], *words]
