"""What a file system lacks is a warning; what may lose data is an error that names the file."""

import errno
import fcntl
import json
import os

import pytest

from trainers.engine import files
from trainers.engine.curves import plot_curves
from trainers.engine.folder import RunFolder, read_metrics


def failing(number):
    def call(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return call


def test_a_lock_keeps_others_out(tmp_path):
    with files.lock(tmp_path / "a"), pytest.raises(BlockingIOError):
        files.lock(tmp_path / "a", shared=True)
    with files.lock(tmp_path / "a", shared=True), files.lock(tmp_path / "a", shared=True):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning_that_names_it(
    number, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    for _ in range(2):
        folder = RunFolder(tmp_path, epochs=1)
        folder.lock()
        folder.close()
    warning = f"warning: {tmp_path} cannot be locked, start nothing else in it: "
    assert capsys.readouterr().err == warning + os.strerror(number) + "\n"


def test_a_folder_that_cannot_be_synced_is_a_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    files.sync(tmp_path)
    assert "does not sync folders" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}'"):
        files.sync(tmp_path)


def test_what_cannot_be_removed_stays_with_a_warning(tmp_path, capsys, monkeypatch):
    for make in (os.mkdir, lambda path: path.write_text("")):
        make(tmp_path / "old")
        files.remove(tmp_path / "old")
        assert not (tmp_path / "old").exists()
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "rmdir", failing(errno.EBUSY))
    files.remove(tmp_path / "old")
    assert "keeps what should be removed, old" in capsys.readouterr().err


def test_a_full_disk_is_named():
    """/dev/full is one."""
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        with files.naming("/dev/full"), open("/dev/full", "w") as file:
            file.write("x")
            file.flush()


def test_a_disk_that_is_full_while_a_run_logs_is_named(tmp_path):
    run = RunFolder(tmp_path, epochs=1)
    run.lock()
    run.start({}, [], updates=0, epochs=0)
    run._metrics = open("/dev/full", "w")
    for fails in (lambda: run.append({"loss": 1.0}), run.close):
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/metrics.jsonl'"):
            fails()
    files.lock(tmp_path / ".lock").close()  # is free


def test_addresses_are_no_paths():
    assert files.path_of("~/runs") == files.pathlib.Path.home() / "runs"
    assert str(files.path_of("a:b//c")) == "a:b/c"
    assert str(files.path_of(".")) == "." and str(files.path_of("/")) == "/"
    for text in ("gs://bucket/run", "s3://a", "hdfs://host/a"):
        with pytest.raises(ValueError, match=f"{text} is an address"):
            files.path_of(text)


def test_what_must_be_a_folder_is_told(tmp_path):
    (tmp_path / "link").symlink_to("/nowhere/scratch")
    (tmp_path / "file").write_text("")
    for name, what in (("link", "a link to what is not there"), ("file", "something else")):
        with pytest.raises(OSError, match=f"{name} must be a folder, and is {what}"):
            files.make_folder(tmp_path / name)
    with pytest.raises(OSError, match="file/below is below a file"):
        files.make_folder(tmp_path / "file" / "below")


def test_damaged_and_foreign_lines_of_a_log_are_passed_over(tmp_path):
    values = b'"loss": 1.0, "learning_rate": 0.1}'
    lines = [
        b'{"type": "step", "update": 1, ' + values,
        b'{"step": 1}',
        b"\xff\xfe\xe9",
        b"\0" * 99,
    ]
    lines += [b"[1]", b'{"type": "epoch", "update": 2}', b'{"type": "step", "update": 2, ' + values]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, b'{"type": "st']))
    assert [record["update"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("text", ["", " ", "gs://b/run", "s3:/b", "~nobody-here/run"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(ValueError):
        files.path_of(text)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    assert files.output_file(str(tmp_path / "a.json")) == tmp_path / "a.json"
    for path in (tmp_path, tmp_path / "none" / "a.json"):
        with pytest.raises(ValueError, match=str(path)):
            files.output_file(str(path))


FOREIGN = [
    {"type": "step", "update": 1},
    {"type": "epoch", "update": 1},
    {"type": "step", "update": 1, "loss": [1], "learning_rate": 0.1},
    {"type": "step", "update": 10**400, "loss": 1.0, "learning_rate": 0.1},
    {"type": ["step"]},
]


def test_lines_of_another_program_are_passed_over(tmp_path):
    own = {"type": "step", "update": 1, "loss": 1.0, "learning_rate": 0.1, "step_size": 0.1}
    other = {"type": "step", "update": 2, "loss": None, "learning_rate": 0.1}
    epoch = {"type": "epoch", "update": 2, "epoch": 1, "top1": "high"}
    lines = [*map(json.dumps, [own, *FOREIGN, other, epoch]), "[" * 100_000]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [own, other, epoch]
    plot_curves(read_metrics(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
