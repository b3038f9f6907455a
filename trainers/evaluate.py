"""Evaluates or exports a saved run: `python -m trainers.evaluate --checkpoint=runs/mine`."""

import trainers.quick_start  # noqa: F401

# isort: split

import importlib
import pathlib
import tempfile

import keras
import tensorflow as tf
from absl import app, flags

from trainers.engine import folder
from trainers.engine.checkpoints import STATE, Checkpoints, copy
from trainers.engine.cluster import OneProcess
from trainers.engine.evaluator import Evaluator
from trainers.engine.run import configure_keras
from trainers.flags import define_path

FLAGS = flags.FLAGS

define_path("checkpoint", "A run folder, or one of its checkpoints; of a run folder the newest.")
flags.DEFINE_bool("averaged", False, "Take the moving average of the weights.")
define_path("export", "File NAME.keras to write the model to, instead of evaluating.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    configure_keras()
    try:
        if not FLAGS.checkpoint:
            raise ValueError("--checkpoint is needed: a run folder, or one of its checkpoints")
        with tempfile.TemporaryDirectory() as scratch:
            print(evaluated(pathlib.Path(FLAGS.checkpoint).resolve(), pathlib.Path(scratch)))
    except (ValueError, OSError, tf.errors.OpError) as error:
        raise SystemExit(f"error: {error}") from None


def evaluated(path, scratch):
    """What became of the checkpoint that `path` means, as a line of text.

    Args:
        path: of a run folder, or of one of its checkpoints.
        scratch: path of an empty folder for a copy: a training may remove the checkpoint.
    """
    if FLAGS.export and not FLAGS.export.endswith(".keras"):
        raise ValueError(f"--export={FLAGS.export} must end in .keras")
    if path.parent.name == folder.CHECKPOINTS:
        place, checkpoint = path.parents[1], copy(path, scratch)
    else:
        place = path
        checkpoint = Checkpoints(path / folder.CHECKPOINTS).copy_newest(scratch, print)
        if checkpoint is None:
            raise ValueError(f"--checkpoint={path}: no checkpoint under {folder.CHECKPOINTS}")
    task, class_names = _task(place)
    task.check()
    if FLAGS.export:
        if not pathlib.Path(FLAGS.export).absolute().parent.is_dir():
            raise ValueError(f"--export={FLAGS.export} is in a folder that is not there")
    else:
        task.load()
        if task.class_names != class_names:
            raise ValueError(f"the classes under --data_dir={FLAGS.data_dir} are not the run's")
    model = task.model()
    _restore(model, checkpoint, place)
    if FLAGS.export:
        model.save(FLAGS.export)
        return f"{checkpoint.name}: written to {FLAGS.export}"
    loss, top1, top5 = Evaluator(model)(task.test_batches(0, 1), OneProcess())
    return f"{checkpoint.name}: loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}"


def parse(argv):
    """Parses the flags, which are also those of the trainer that made the run."""
    try:
        return _parsed(argv)
    except flags.Error as error:
        raise SystemExit(f"error: {error}") from None


def _parsed(argv):
    FLAGS(argv, known_only=True)
    saved = pathlib.Path(FLAGS.checkpoint or "").resolve()
    for place in (saved, saved.parent.parent):
        if (place / folder.FLAGS).is_file():
            _trainer(place)
            break
    FLAGS.unparse_flags()
    return FLAGS(argv)


def _saved_flags(place):
    saved = folder.read_flags(place) or {}
    if missing := {"trainer", "classes"} - set(saved):
        what = f"it has no flag {', '.join(sorted(missing))}"
        raise SystemExit(f"error: {place / folder.FLAGS} is not of a run: {what}")
    return saved


def _trainer(place):
    """The module of the trainer that made the run in a folder; it defines flags."""
    name = _saved_flags(place)["trainer"]
    try:
        module = importlib.import_module(name)
        module.TASK  # noqa: B018
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SystemExit(
            f"error: the trainer {name!r} of {place / folder.FLAGS} cannot be imported: {error}. "
            "Start this where the run was started, or set PYTHONPATH"
        ) from None
    return module


def _task(place):
    """The task of the run in a folder, with its flags set as they were, and the class names."""
    saved = _saved_flags(place)
    task = _trainer(place).TASK()
    task.classes = saved["classes"]  # known without the data
    for name, value in saved.items():
        if name in FLAGS and not FLAGS[name].present and value != FLAGS[name].value:
            try:
                FLAGS[name].value = value if value is None else FLAGS[name].parser.parse(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place / folder.FLAGS}: --{name}={value}: {error}") from None
    keras.config.set_dtype_policy(FLAGS.dtype_policy)
    return task, saved.get("class_names")


def _restore(model, checkpoint, place):
    averages = [tf.Variable(v) for v in model.trainable_variables]
    tf.get_logger().setLevel("ERROR")  # a long list of what is not restored
    try:
        status = tf.train.Checkpoint(model=model, averages=averages).read(str(checkpoint / STATE))
        status.expect_partial().assert_existing_objects_matched()
    except (AssertionError, ValueError, tf.errors.OpError):
        saved = _saved_flags(place)
        changed = [
            f"--{name}={FLAGS[name].value}, was {value}"
            for name, value in saved.items()
            if name in FLAGS and FLAGS[name].value != value
        ]
        raise ValueError(
            f"{checkpoint.name} is of another model: {'; '.join(changed) or 'see its flags.json'}"
        ) from None
    if FLAGS.averaged:
        for variable, average in zip(model.trainable_variables, averages):
            variable.assign(average)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
