"""What a run tells: to the terminal, the run folder and TensorBoard."""

import contextlib
import math
import sys

import keras
import tensorflow as tf

from trainers.engine import files
from trainers.engine.curves import plot_curves
from trainers.engine.folder import BOARD


class Silent:
    """The reporter of every worker but the first: says and writes nothing."""

    def __getattr__(self, name):
        return lambda *arguments: None


class Reporter:
    """The reporter of worker 0.

    On a terminal it shows a progress bar for each epoch; elsewhere one line for each epoch.

    Args:
        folder: a `RunFolder` that is locked, and started before `start` here.
    """

    def __init__(self, folder):
        self.folder = folder
        self.epochs = folder.epochs
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self._board = None

    def say(self, line):
        print(line, flush=True)

    def start(self, lines):
        """Begins with lines of text; the folder has been started."""
        path = self.folder.path / BOARD
        try:
            files.make_folder(path)
            self._board = tf.summary.create_file_writer(str(path))
        except tf.errors.OpError as error:
            raise OSError(f"{path} cannot be written to: {error.message}") from None
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
                f"gain ratio {record['gain_ratio']:.2g}"
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
        if self._board is not None:
            with contextlib.suppress(tf.errors.OpError):
                self._board.close()
        self.folder.close()

    def finish(self, summary):
        self.folder.finish(summary)
        try:
            plot_curves(self.folder.records, self.folder.path / "curves.png")
        except OSError as error:
            self.say(f"warning: no picture of the run: {error}")
        if not math.isfinite(summary["loss"]):
            self.say("warning: training diverged, the loss is not finite")
        self.say(f"done: top-1 {summary['top1']:.2%} after {summary['updates']} updates")
        self.say(f"run folder: {self.folder.path}")

    def _write(self, record):
        self.folder.append(record)
        if self._board is None:
            return
        try:
            with self._board.as_default(step=record["update"]):
                for name, value in record.items():
                    if isinstance(value, float):
                        tf.summary.scalar(f"{record['type']}/{name}", value)
        except tf.errors.OpError as error:  # the same values are in the folder's log
            self._board = None
            self.say(f"warning: nothing more for TensorBoard: {error.message}")
