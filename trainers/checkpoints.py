"""Checkpoints that are whole or not there: written beside, synced, renamed."""

import json
import os
import pathlib
import shutil

import tensorflow as tf

STATE = "state"
META = "meta.json"


class Checkpoints:
    """The checkpoints of one run, each a folder `update-NNNNNNNN` named by the updates done.

    Args:
        folder: path of the folder that holds them.
        keep: int, how many of the newest stay.
        **objects: what to save and restore, trackable by TensorFlow: `model=model, ...`.
    """

    def __init__(self, folder, keep=2, **objects):
        self.folder = pathlib.Path(folder)
        self.keep = keep
        self._checkpoint = tf.train.Checkpoint(**objects)

    def all(self):
        """The complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("update-*") if (p / META).is_file())

    def save(self, update, meta):
        """Saves the objects and the JSON object `meta` as the state after `update` updates."""
        target = self.folder / f"update-{update:08d}"
        partial = self.folder / f"partial-{update:08d}"
        for folder in (partial, target):
            shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
        self._checkpoint.write(str(partial / STATE))
        (partial / META).write_text(json.dumps({"update": update, **meta}))
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        partial.rename(target)
        _sync(self.folder)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, path):
        """Restores every object from `path` and returns its `meta`.

        Raises:
            ValueError: if what was saved and what is restored differ in any variable.
        """
        try:
            status = self._checkpoint.read(str(path / STATE))
            status.assert_consumed()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"checkpoint {path} does not fit this run: {error}") from error
        return self.meta(path)

    def meta(self, path):
        """The JSON object that was saved with the checkpoint at `path`."""
        return json.loads((path / META).read_text())


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
