"""Checkpoints that are whole or not there: written beside, synced, renamed, with checksums."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile

import tensorflow as tf

from trainers.engine import files

STATE = "state"
META = "meta.json"
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Folders of another name are a user's own and left alone.
NAME = re.compile(r"(update|partial)-(\d{8,})-epoch-(\d{4,})")


class Checkpoints:
    """The checkpoints of one run: folders named by the updates and whole epochs done.

    Args:
        folder: path of the folder that holds them.
        keep: int, how many of the newest stay.
    """

    def __init__(self, folder, keep=2):
        self.folder = pathlib.Path(folder)
        self.keep = keep

    def prepare(self):
        """Makes the folder, and finds out whether it can be written to.

        Raises:
            OSError: if it cannot.
        """
        files.make_folder(self.folder)
        with tempfile.TemporaryFile(dir=self.folder):
            pass

    def all(self):
        """The checkpoints, oldest first, damaged ones too."""
        return self._named("update")

    def _named(self, kind):
        names = {path: NAME.fullmatch(path.name) for path in self.folder.glob(f"{kind}-*")}
        places = {path: (int(m[2]), int(m[3])) for path, m in names.items() if m}
        return sorted(places, key=places.get)

    def save(self, update, epoch, meta, **objects):
        """Saves objects and the JSON object `meta` as the state after so many updates.

        Args:
            **objects: trackable by TensorFlow: `model=model, ...`.

        Raises:
            OSError: if they cannot be written; the checkpoints that there are stay.
        """
        name = f"{update:08d}-epoch-{epoch:04d}"
        target, partial = self.folder / f"update-{name}", self.folder / f"partial-{name}"
        if os.path.lexists(target):
            if damage(target) is None:
                return
            files.remove(target)
        # What a killed process was writing is of no use to anyone.
        for left_over in self._named("partial"):
            files.remove(left_over)
        partial.mkdir(parents=True, exist_ok=True)
        try:
            tf.train.Checkpoint(**objects).write(str(partial / STATE))
        except tf.errors.OpError as error:
            raise OSError(f"checkpoint {partial} cannot be written: {error.message}") from error
        # Not what could not be removed before.
        written = list(partial.glob(f"{STATE}.*"))
        digests = {path.name: _digest(path) for path in written}
        content = json.dumps({**meta, "update": update, "files": digests})
        with files.naming(partial / META):
            text = json.dumps({"digest": _text_digest(content), "meta": content})
            (partial / META).write_text(text)
        for path in [*written, partial / META, partial]:
            files.sync(path)
        partial.rename(target)
        files.sync(self.folder)
        saved = self.all()
        # Later ones are damaged, or of a course that was given up.
        later = saved[saved.index(target) + 1 :]
        for old in [*saved[: -self.keep - len(later)], *later]:
            files.remove(old)

    def newest(self, warn):
        """The newest checkpoint that is whole and its `meta`, or `(None, {})` if there is none.

        Args:
            warn: function of a line of text, called for each damaged one that is passed over.

        Raises:
            ValueError: if there are checkpoints, and all are damaged.
            OSError: if one cannot be read, which need not mean that it is damaged: going on from
                an older one would end with the removal of this one.
        """
        saved = self.all()
        for path in reversed(saved):
            found = damage(path)
            if found is None:
                return path, _meta(path)
            warn(f"warning: checkpoint {path} is damaged and passed over: {found}")
        if saved:
            raise ValueError(
                f"all checkpoints under {self.folder} are damaged: remove them to start anew"
            )
        return None, {}

    def copy_newest(self, folder, warn, tries=50):
        """Copies the newest whole checkpoint into a folder: a training may remove it meanwhile.

        Args:
            folder: path of an empty folder.
            warn: as for `newest`.
            tries: int, how many checkpoints may vanish while they are copied.

        Returns:
            The path of the copy, or `None` without a checkpoint.

        Raises:
            ValueError, OSError: as `newest`.
        """
        for _ in range(tries):
            saved = self.all()
            if not saved:
                return None
            for path in reversed(saved):
                try:
                    return copy(path, folder)
                except (OSError, ValueError) as error:
                    if not path.exists():
                        break  # there is a newer one now
                    if isinstance(error, OSError):
                        raise
                    warn(f"warning: {error}")
            else:
                raise ValueError(f"all checkpoints under {self.folder} are damaged")
        raise OSError(f"{tries} checkpoints under {self.folder} vanished while they were read")

    def restore(self, path, **objects):
        """Restores objects, as `save` takes them, from `path`.

        Raises:
            ValueError: if what was saved and what is restored differ in any variable.
        """
        try:
            status = tf.train.Checkpoint(**objects).read(str(path / STATE))
            status.assert_consumed()
            status.assert_existing_objects_matched()
        except (AssertionError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"checkpoint {path} does not fit this run: {error}") from error


def copy(path, folder):
    """Copies a checkpoint into a folder.

    Returns:
        The path of the copy.

    Raises:
        ValueError: if it is damaged.
        OSError: if it cannot be read, or there is no room for it.
    """
    target = folder / path.name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path, target)
    if problem := damage(target):
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    return target


def damage(path):
    """What is wrong with the files of the checkpoint at `path`, or `None`.

    Raises:
        OSError: if a file is there and cannot be read.
    """
    try:
        files = _meta(path)["files"]
        changed = [name for name, digest in files.items() if _digest(path / name) != digest]
    except (*MISSING, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(changed)} changed since it was written" if changed else None


def _meta(path):
    """What was saved as `meta`; a ValueError if it was changed since."""
    written = json.loads((path / META).read_text())
    if _text_digest(written["meta"]) != written["digest"]:
        raise ValueError(f"{META} changed since it was written")
    return json.loads(written["meta"])


def _text_digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
