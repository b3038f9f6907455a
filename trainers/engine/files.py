"""Paths, locks, syncs and whole writes, on file systems that do not offer all of them.

Network file systems leave out what moves no data: locks (Lustre without `-o flock`, NFS without
lockd), the sync of a folder (CIFS, FUSE), the removal of a file that is still open (NFS). What is
not offered is a warning, once for each folder. Only what may lose data is an error: an `OSError`
that names the file.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import sys

LOSES_DATA = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_warned = set()


class NoPathError(argparse.ArgumentTypeError, ValueError):
    """What is no path stands where one is needed."""


def path_of(text):
    """The path that the value of a flag means, `~` being the home folder.

    Raises:
        NoPathError: for an address as gs://bucket/run, and for a name that is no UTF-8.
    """
    if not text.strip():
        raise NoPathError("is empty: give a path")
    if re.match(r"\w[\w+.-]*://|(gs|s3|hdfs|file|dbfs):/", text):
        raise NoPathError(f"{text} is an address: give a path of a mounted file system")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoPathError(
            f"{text!r} is no UTF-8, at least not in this locale: set PYTHONUTF8=1, or rename it"
        ) from None
    path = pathlib.Path(os.path.expanduser(text))
    if str(path).startswith("~"):
        raise NoPathError(f"{text} names a user that this machine does not know")
    return path


def output_file(text):
    """The path of a file that a program is going to write, for argparse.

    Raises:
        NoPathError: if it cannot be written to, before anything is computed for it.
    """
    path = path_of(text)
    if path.is_dir():
        raise NoPathError(f"{text} is a folder: give a file")
    if not path.absolute().parent.is_dir():
        raise NoPathError(f"{text} is in a folder that is not there")
    return path


def make_folder(path):
    """Makes a folder, unless it is there.

    Raises:
        OSError: if it cannot be made, or something else is in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        what = "a link to what is not there" if path.is_symlink() else "something else"
        raise OSError(f"{path} must be a folder, and is {what}: choose another path") from None
    except NotADirectoryError:
        raise OSError(f"{path} is below a file: choose another path") from None


def lock(path, shared=False, wait=False):
    """Opens a file and takes its lock for this process, until the file is closed.

    Args:
        path: path of the file, which is made where there is none.
        shared: whether others may have a shared lock at the same time.
        wait: whether to wait for another process that has it.

    Returns:
        The open file.

    Raises:
        BlockingIOError: if another process has the lock, unless `wait`.
        OSError: if the file cannot be opened.
    """
    # NFS gives a shared lock to those who may read, the other one to those who may write.
    file = path.open("a+")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError as error:
        _warn(path.parent, "cannot be locked, start nothing else in it", error)
    return file


def sync(path):
    """Waits until a file or folder is on the disk.

    Raises:
        OSError: if it may not get there.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in LOSES_DATA:
            raise OSError(error.errno, error.strerror, str(path)) from None
        kind = "folders" if path.is_dir() else "files"
        _warn(path.parent, f"does not sync {kind}, a power failure may lose the newest", error)


def remove(path):
    """Removes a folder, or a file in its place, that nobody needs any more."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _warn(path.parent, f"keeps what should be removed, {path.name}", error)


def write(path, text):
    """Writes a text file so that a kill leaves the old one or the new one, never a half."""
    # A name of its own: two programs may write the same table.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with naming(partial):
        partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def naming(path):
    """Context in which an `OSError` that names no file, as of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def _warn(folder, what, error):
    if (folder, what) not in _warned:
        _warned.add((folder, what))
        print(f"warning: {folder} {what}: {error.strerror}", file=sys.stderr, flush=True)
