"""Evaluates or exports a saved run: `python -m trainers.evaluate --checkpoint=runs/mine`."""

import trainers.quick_start  # noqa: F401

# isort: split

import importlib
import pathlib

import keras
import tensorflow as tf
from absl import app, flags

from trainers.engine import folder
from trainers.engine.checkpoints import STATE, Checkpoints, damage
from trainers.engine.cluster import OneProcess
from trainers.engine.evaluator import Evaluator
from trainers.engine.run import configure_keras

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "checkpoint", None, "A run folder, or one of its checkpoints; of a run folder the newest."
)
flags.DEFINE_bool("averaged", False, "Take the moving average of the weights.")
flags.DEFINE_string("export", None, "File NAME.keras to write the model to, instead of evaluating.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    configure_keras()
    try:
        if not FLAGS.checkpoint:
            raise ValueError("--checkpoint is needed: a run folder, or one of its checkpoints")
        if FLAGS.export and not FLAGS.export.endswith(".keras"):
            raise ValueError(f"--export={FLAGS.export} must end in .keras")
        checkpoint = _newest(pathlib.Path(FLAGS.checkpoint))
        task, class_names = _task(checkpoint.parents[1])
        task.check()
        if FLAGS.export:
            if not pathlib.Path(FLAGS.export).absolute().parent.is_dir():
                raise ValueError(f"--export={FLAGS.export} is in a folder that is not there")
        else:
            task.load()
            if task.class_names != class_names:
                raise ValueError(f"the classes under --data_dir={FLAGS.data_dir} are not the run's")
        model = task.model()
        _restore(model, checkpoint)
        if FLAGS.export:
            model.save(FLAGS.export)
            print(f"{checkpoint.name}: written to {FLAGS.export}")
            return
        loss, top1, top5 = Evaluator(model)(task.test_batches(0, 1), OneProcess())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{checkpoint.name}: loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}")


def parse(argv):
    """Parses the flags, which are also those of the trainer that made the run."""
    FLAGS(argv, known_only=True)
    saved = pathlib.Path(FLAGS.checkpoint or "").resolve()
    for place in (saved, saved.parent.parent):
        if (place / folder.FLAGS).is_file():
            importlib.import_module(_saved_flags(place)["trainer"])
            break
    FLAGS.unparse_flags()
    return FLAGS(argv)


def _saved_flags(place):
    saved = folder.read_flags(place) or {}
    if missing := {"trainer", "classes"} - set(saved):
        what = f"it has no flag {', '.join(sorted(missing))}"
        raise SystemExit(f"error: {place / folder.FLAGS} is not of a run: {what}")
    return saved


def _newest(path):
    """The checkpoint meant by a run folder or a checkpoint's own."""
    path = path.resolve()
    if path.parent.name == folder.CHECKPOINTS:
        problem = damage(path)
        if problem:
            raise ValueError(f"--checkpoint={path} is damaged: {problem}")
        return path
    checkpoints = path / folder.CHECKPOINTS
    found, _ = Checkpoints(checkpoints).newest(print)
    if found is None:
        raise ValueError(f"--checkpoint={path}: no checkpoint under {checkpoints}")
    return found


def _task(place):
    """The task of the run in a folder, with its flags set as they were, and the class names."""
    saved = _saved_flags(place)
    task = importlib.import_module(saved["trainer"]).TASK()
    task.classes = saved["classes"]  # known without the data
    given = {name for name in saved if name in FLAGS and FLAGS[name].present}
    for name, value in saved.items():
        if name in FLAGS and name not in given:
            FLAGS[name].value = value
    keras.config.set_dtype_policy(FLAGS.dtype_policy)
    return task, saved.get("class_names")


def _restore(model, checkpoint):
    averages = [tf.Variable(v) for v in model.trainable_variables]
    status = tf.train.Checkpoint(model=model, averages=averages).read(str(checkpoint / STATE))
    status.assert_existing_objects_matched().expect_partial()
    if FLAGS.averaged:
        for variable, average in zip(model.trainable_variables, averages):
            variable.assign(average)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
