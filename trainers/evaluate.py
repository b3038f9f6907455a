"""Evaluates or exports a saved run: `python -m trainers.evaluate --checkpoint=runs/mine`."""

import importlib
import json
import pathlib

import keras
import tensorflow as tf
from absl import app, flags

from trainers import settings, workers
from trainers.checkpoints import STATE, Checkpoints, damage
from trainers.evaluation import Evaluator

FLAGS = flags.FLAGS

flags.DEFINE_string(
    "checkpoint", None, "A run folder, or one of its checkpoints; of a run folder the newest."
)
flags.DEFINE_bool("averaged", False, "Take the moving average of the weights.")
flags.DEFINE_string("export", None, "File NAME.keras to write the model to, instead of evaluating.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    settings.configure_keras()
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
        loss, top1, top5 = Evaluator(model)(task.test_batches(0, 1), workers.OneProcess())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{checkpoint.name}: loss {loss:.4f}  top-1 {top1:.2%}  top-5 {top5:.2%}")


def parse(argv):
    """Parses the flags, which are also those of the trainer that made the run."""
    FLAGS(argv, known_only=True)
    saved = pathlib.Path(FLAGS.checkpoint or "").resolve()
    for folder in (saved, saved.parent.parent):
        if (folder / "flags.json").is_file():
            importlib.import_module(_saved_flags(folder)["trainer"])
            break
    FLAGS.unparse_flags()
    return FLAGS(argv)


def _saved_flags(folder):
    try:
        saved = json.loads((folder / "flags.json").read_text())["flags"]
        saved["trainer"], saved["classes"]  # every run has them
    except (ValueError, KeyError) as error:
        raise SystemExit(f"error: {folder / 'flags.json'} is not of a run: {error}") from None
    return saved


def _newest(path):
    """The checkpoint meant by a run folder or a checkpoint's own."""
    path = path.resolve()
    if path.parent.name == "checkpoints":
        problem = damage(path)
        if problem:
            raise ValueError(f"--checkpoint={path} is damaged: {problem}")
        return path
    found, _ = Checkpoints(path / "checkpoints").newest(print)
    if found is None:
        raise ValueError(f"--checkpoint={path}: no checkpoint under {path / 'checkpoints'}")
    return found


def _task(folder):
    """The task of the run in `folder`, with its flags set as they were, and the class names."""
    saved = _saved_flags(folder)
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
