"""Checkpoints are whole or not there, and how a batch is divided."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

from trainers.engine.checkpoints import Checkpoints
from trainers.engine.plan import divide


def test_elastic_workers_divide_the_same_batch():
    assert [divide(96, 16, workers) for workers in (1, 2, 3, 4, 12)] == [16, 16, 16, 12, 8]
    with pytest.raises(ValueError, match="--global_batch_size=96 cannot be divided among 5"):
        divide(96, 16, 5)


def test_checkpoints_are_whole_and_the_newest_whole_one_is_taken(tmp_path):
    a, b = tf.Variable([1.0, 2.0]), tf.Variable(3.0)
    saved = Checkpoints(tmp_path, keep=2)
    assert saved.newest(print) == (None, {})
    for update in (1, 2, 3):
        b.assign(update)
        saved.save(update, 0, {"record": {"epoch": update}}, a=a, b=b)
    names = ["update-00000002-epoch-0000", "update-00000003-epoch-0000"]
    assert [path.name for path in saved.all()] == names
    path, meta = saved.newest(print)
    assert path.name == names[1] and meta["update"] == 3 and meta["record"] == {"epoch": 3}
    a.assign([0.0, 0.0])
    saved.restore(path, a=a, b=b)
    np.testing.assert_array_equal(a.numpy(), [1.0, 2.0])
    for others in ({"a": a}, {"a": a, "b": b, "c": tf.Variable(0.0)}, {"a": tf.Variable([1.0])}):
        with pytest.raises(ValueError, match="does not fit this run"):
            saved.restore(path, **others)
    # What a killed process left is swept away by the next save; what a user made stays.
    (tmp_path / "partial-00000009-epoch-0000").mkdir()
    of_users = [tmp_path / "update-best", tmp_path / "partial-best"]
    for copy in of_users:
        shutil.copytree(path, copy)
    assert saved.newest(print)[0] == path
    saved.save(3, 1, {}, a=a)
    assert [path.name[-4:] for path in saved.all()] == ["0000", "0001"]
    assert not list(tmp_path.glob("partial-0*")) and all(copy.is_dir() for copy in of_users)


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(tmp_path):
    """A read error may pass; going on from an older checkpoint would end with its removal."""
    saved = Checkpoints(tmp_path)
    for update in (1, 2):
        saved.save(update, 0, {}, a=tf.Variable(1.0))
    meta = saved.all()[-1] / "meta.json"
    meta.unlink()
    meta.symlink_to(meta)
    with pytest.raises(OSError, match=r"meta\.json"):
        saved.newest(print)


def test_a_checkpoint_is_copied_although_a_training_removes_it(tmp_path, monkeypatch):
    """The first vanishes in between, the second is damaged."""
    saved, copytree = Checkpoints(tmp_path / "run", keep=3), shutil.copytree
    for update in (1, 2, 3):
        saved.save(update, 0, {}, a=tf.Variable(1.0))
    first, second, third = saved.all()
    (second / "meta.json").write_text("{}")

    def copy(source, target):
        if source == third:
            shutil.rmtree(third)
        return copytree(source, target)

    monkeypatch.setattr(shutil, "copytree", copy)
    warnings = []
    found = saved.copy_newest(tmp_path / "copies", warnings.append)
    assert found == tmp_path / "copies" / first.name and (found / "state.index").is_file()
    assert len(warnings) == 1 and f"{second} is damaged" in warnings[0]
    assert Checkpoints(tmp_path / "none").copy_newest(tmp_path / "copies", print) is None


def test_a_checkpoint_that_tensorflow_cannot_write_is_an_error_of_the_folder(tmp_path):
    saved = Checkpoints(tmp_path)
    (tmp_path / "partial-00000001-epoch-0000").mkdir()
    saved.prepare()

    class Unwritable(tf.train.Checkpoint):
        def _serialize_to_tensors(self):
            raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    with pytest.raises(OSError, match=f"checkpoint {tmp_path}.*No space left on device"):
        saved.save(1, 0, {}, a=Unwritable())


@pytest.mark.parametrize(
    "how", ["cut", "changed", "gone", "meta cut", "meta gone", "meta changed", "no list"]
)
def test_a_damaged_checkpoint_is_passed_over(how, tmp_path):
    a = tf.Variable(np.arange(1000.0))
    saved = Checkpoints(tmp_path, keep=3)
    for update in (1, 2):
        a.assign_add(tf.ones(1000, a.dtype))
        saved.save(update, 0, {}, a=a)
    newest = saved.all()[-1]
    data, meta = next(newest.glob("state.data*")), newest / "meta.json"
    file = meta if "meta" in how else data
    content = bytearray(file.read_bytes())
    if how.endswith("cut"):
        file.write_bytes(content[: len(content) // 2])
    elif how.endswith("gone"):
        file.unlink()
    elif how == "changed":
        content[500] ^= 1
        file.write_bytes(content)
    elif how == "meta changed":
        meta.write_text(meta.read_text().replace("update", "updaet"))
    else:
        meta.write_text("[]")
    warnings = []
    path, _ = saved.newest(warnings.append)
    assert path.name == "update-00000001-epoch-0000"
    assert len(warnings) == 1 and str(newest) in warnings[0] and "damaged" in warnings[0]
    # Training comes to the same update again, and saves it again; or to one before a damaged one.
    saved.save(2, 0, {}, a=a)
    assert saved.newest(print)[0] == newest
    saved.save(9, 0, {}, a=a)
    next(saved.all()[-1].glob("state.data*")).unlink()
    fewer = Checkpoints(tmp_path, keep=1)
    fewer.save(6, 0, {}, a=a)
    assert [path.name for path in fewer.all()] == ["update-00000006-epoch-0000"]
    for path in saved.all():
        (path / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"all checkpoints under .* are damaged"):
        saved.newest(warnings.append)
