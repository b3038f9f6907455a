"""What a run tells: the run folder, the terminal, TensorBoard and a picture of the curves."""

import fcntl
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import sys

import keras
import tensorflow as tf

PACKAGES = ("tensorflow", "keras", "numpy", "horovod", "nlcg_tf")


class Silent:
    """The reporter of every worker but the first: says and writes nothing."""

    def start(self, flags, lines, updates, epochs):
        pass

    def begin_epoch(self, epoch, updates, done):
        pass

    def progress(self, loss):
        pass

    def step(self, record):
        pass

    def epoch(self, record):
        pass

    def say(self, line):
        pass

    def finish(self, summary):
        pass

    def close(self):
        pass


class Reporter(Silent):
    """The reporter of worker 0.

    On a terminal it shows a progress bar for each epoch; elsewhere one line for each epoch.

    Args:
        folder: path of the run folder; see README for what it will hold.
        epochs: int, length of the whole run.
    """

    def __init__(self, folder, epochs):
        self.folder = pathlib.Path(folder)
        self.epochs = epochs
        self.terminal = sys.stdout.isatty()
        self.records = []
        self._metrics = self._board = self._lock = None

    def say(self, line):
        print(line, flush=True)

    def lock(self):
        """Takes the run folder for this process, until it ends or `close` is called.

        Raises:
            OSError: if the folder cannot be made, or another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another run is using --output_dir={self.folder}") from None

    def start(self, flags, lines, updates, epochs):
        """Begins, or goes on after so many updates and whole epochs."""
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            # A resumed run writes again what came after its checkpoint; a killed one may have left
            # half a line.
            self.records = [
                r
                for r in _parsed(metrics)
                if (r["epoch"] <= epochs if r["type"] == "epoch" else r["update"] <= updates)
            ]
        _replace(metrics, "".join(_line(record) for record in self.records))
        description = {"flags": flags, "versions": versions(), "git_revision": git_revision()}
        _replace(self.folder / "flags.json", json.dumps(description, indent=2) + "\n")
        # Of a run that is started again after its end the summary stays.
        self._finished_before = epochs == self.epochs and (self.folder / "summary.json").exists()
        self._metrics = metrics.open("a")
        self._board = tf.summary.create_file_writer(str(self.folder / "tensorboard"))
        for line in lines:
            self.say(line)

    def begin_epoch(self, epoch, updates, done):
        if self.terminal:
            self.say(f"Epoch {epoch + 1}/{self.epochs}")
            self._bar = keras.utils.Progbar(updates)
            self._done = done

    def progress(self, loss):
        if self.terminal:
            self._done += 1
            self._bar.update(self._done, [("loss", float(loss))])

    def step(self, record):
        self._write({"type": "step", **record})

    def epoch(self, record):
        self._write({"type": "epoch", **record})
        tested = ""
        if "top1" in record:
            tested = (
                f"top-1 {record['top1']:.2%}  top-5 {record['top5']:.2%}  "
                f"(averaged weights {record['averaged_top1']:.2%})  "
            )
        nlcg = ""
        if "beta" in record:
            nlcg = (
                f"  beta {record['beta']:.2f}  learning-rate scale "
                f"{record['learning_rate_scale']:.3f}  cosine {record['cosine']:.2g}  "
                f"kappa {record['kappa']:.2g}"
            )
        self.say(
            f"epoch {record['epoch']}/{self.epochs}  loss {record['loss']:.4f}  {tested}"
            f"train top-1 {record['train_top1']:.2%}  {record['images_per_second']:.0f} images/s"
            f"{nlcg}"
        )
        if record.get("overflowed_updates"):
            self.say(
                f"{record['overflowed_updates']} of {record['update']} updates so far left out: "
                f"they overflowed float16; the loss scale is {record['loss_scale']:g}"
            )

    def close(self):
        for file in (self._metrics, self._board, self._lock):
            if file is not None:
                file.close()

    def finish(self, summary):
        if not self._finished_before:
            text = json.dumps(_finite(summary), indent=2) + "\n"
            _replace(self.folder / "summary.json", text)
        plot_curves(self.records, self.folder / "curves.png")
        if not math.isfinite(summary["loss"]):
            self.say("warning: training diverged, the loss is not finite")
        self.say(f"done: top-1 {summary['top1']:.2%} after {summary['updates']} updates")
        self.say(f"run folder: {self.folder}")

    def _write(self, record):
        self.records.append(record)
        self._metrics.write(_line(record))
        self._metrics.flush()
        with self._board.as_default(step=record["update"]):
            for name, value in record.items():
                if isinstance(value, float):
                    tf.summary.scalar(f"{record['type']}/{name}", value)


def _finite(record):
    """JSON has no NaN: such values become null."""
    bad = [k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)]
    return {**record, **dict.fromkeys(bad)}


def _replace(path, text):
    """Writes a file so that a kill leaves the old one or the new one, never a half."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _line(record):
    return json.dumps(_finite(record)) + "\n"


def _parsed(path):
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


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


def plot_curves(records, path):
    """Draws loss, accuracy and step size of one run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [r for r in records if r["type"] == "step"]
    epochs = [r for r in records if r["type"] == "epoch"]
    figure, (loss, accuracy, rate) = pyplot.subplots(1, 3, figsize=(13, 3.6))
    number = lambda x: math.nan if x is None else x  # noqa: E731
    loss.plot(
        [r["update"] for r in steps], [number(r["loss"]) for r in steps], lw=0.8, label="update"
    )
    loss.plot(
        [r["update"] for r in epochs], [number(r["loss"]) for r in epochs], "k-", label="epoch mean"
    )
    loss.set(xlabel="update", ylabel="training loss", yscale="log")
    loss.legend()
    for name, label, style in (
        ("train_top1", "training", "-"),
        ("top1", "test", "-"),
        ("averaged_top1", "test, averaged weights", "--"),
    ):
        tested = [r for r in epochs if name in r]
        values = [100 * r[name] for r in tested]
        accuracy.plot([r["epoch"] for r in tested], values, style, label=label)
    accuracy.set(xlabel="epoch", ylabel="top-1 accuracy (%)")
    accuracy.legend(loc="lower right")
    updates = [r["update"] for r in steps]
    rate.plot(updates, [r["learning_rate"] for r in steps], label="learning rate")
    if steps and "step_size" in steps[0]:
        rate.plot(updates, [r["step_size"] for r in steps], "--", label="step size")
    rate.set(xlabel="update", ylabel="rate")
    rate.legend()
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
