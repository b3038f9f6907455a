"""A run folder on disk: the one place that writes it, and that reads it back.

It holds `flags.json` (the trainer's flags, versions), `metrics.jsonl` (one object a logged step or
epoch), `summary.json` once the run has ended, `checkpoints/`, `tensorboard/` and `curves.png`.
"""

import contextlib
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess

from trainers.engine import files
from trainers.engine.files import naming, write

FLAGS, METRICS, SUMMARY = "flags.json", "metrics.jsonl", "summary.json"
CHECKPOINTS, BOARD = "checkpoints", "tensorboard"
PACKAGES = ("tensorflow", "keras", "jax", "numpy", "horovod", "nlcg_tf")
# Among the saved flags there is what they do not say of the task.
DESCRIBED = ("trainer", "classes", "class_names")


class RunFolder:
    """The run folder while its run goes on.

    Args:
        path: path of the folder.
        epochs: int, length of the whole run.
    """

    def __init__(self, path, epochs):
        self.path = pathlib.Path(path)
        self.epochs = epochs
        self.records = []
        self._metrics = self._lock = None

    def lock(self):
        """Takes the folder for this process, until it ends or `close` is called.

        Raises:
            OSError: if the folder cannot be made, or another process has it.
        """
        files.make_folder(self.path)
        try:
            self._lock = files.lock(self.path / ".lock")
        except BlockingIOError:
            raise OSError(f"another run is using --output_dir={self.path}") from None

    def start(self, flags, free, updates, epochs):
        """Begins, or goes on after so many updates and whole epochs.

        Args:
            flags: dict of the trainer's flags, and of `DESCRIBED`.
            free: list of the names of those that do not decide the result.
            updates, epochs: ints.

        Raises:
            ValueError: if the run has ended and would begin anew, over its results.
        """
        has_summary = (self.path / SUMMARY).exists()
        if has_summary and updates == 0:
            raise ValueError(
                f"--output_dir={self.path} has the results of a run that has ended, and no "
                "checkpoint of it. Choose another one, or remove this one to start anew"
            )
        # Of a run that is started again after its end all stays.
        self._had_ended = has_summary and epochs == self.epochs
        # A resumed run writes again what came after its checkpoint.
        self.records = [
            r
            for r in read_metrics(self.path)
            if (r["epoch"] <= epochs if r["type"] == "epoch" else r["update"] <= updates)
        ]
        write(self.path / METRICS, "".join(_line(record) for record in self.records))
        if not self._had_ended:
            description = {"flags": flags, "free": free}
            description.update(versions=versions(), git_revision=git_revision())
            write(self.path / FLAGS, json.dumps(description, indent=2) + "\n")
        self._metrics = (self.path / METRICS).open("a")

    def append(self, record):
        self.records.append(record)
        with naming(self.path / METRICS):
            self._metrics.write(_line(record))
            self._metrics.flush()

    def finish(self, summary):
        if not self._had_ended:
            write(self.path / SUMMARY, json.dumps(_finite(summary), indent=2) + "\n")

    def close(self):
        try:
            if self._metrics is not None:
                with naming(self.path / METRICS):
                    self._metrics.close()
        finally:
            if self._lock is not None:
                self._lock.close()


def read_json(path):
    """The object in a file; `{}` without one, while it is being written, and for anything else."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_flags(folder):
    """The flags that a run was started with; `None` where the file is another program's."""
    flags = read_json(pathlib.Path(folder, FLAGS)).get("flags")
    return flags if isinstance(flags, dict) else None


def read_metrics(folder):
    """The records of a run's log, list of dicts, without what is damaged or another program's.

    A kill may leave half a line, a power failure zeros or anything else.
    """
    path, records = pathlib.Path(folder, METRICS), []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and _is_record(r)]


# What each record has, and is needed to go on and to draw.
COUNTS = {"step": ("update",), "epoch": ("update", "epoch")}
VALUES = {"step": ("loss", "learning_rate"), "epoch": ()}


def _is_record(record):
    kind = record.get("type")
    if not isinstance(kind, str) or kind not in COUNTS:
        return False
    counts = [record.get(name) for name in COUNTS[kind]]
    values = [record.get(name, "") for name in VALUES[kind]]  # null: was not finite
    return all(type(x) is int and 0 <= x < 2**53 for x in counts) and all(
        x is None or type(x) in (int, float) for x in values
    )


def _line(record):
    return json.dumps(_finite(record)) + "\n"


def _finite(record):
    """JSON has no NaN: such values become null."""
    bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**record, **dict.fromkeys(bad)}


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_revision():
    command = ["git", "-C", str(pathlib.Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
