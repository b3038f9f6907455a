"""One run of a trainer, from flags to summary; the trainers differ in data, model and schedule."""

import os
import pathlib
import sys

import keras
import tensorflow as tf
from absl import app, flags, logging

from trainers import dry_run, loop, preemption, reporting, settings, workers
from trainers.checkpoints import Checkpoints
from trainers.images import DamagedImageError
from trainers.plan import divide, make_plan

FLAGS = flags.FLAGS


def main(make_task):
    """The program of a trainer; `make_task` makes its task once the flags are read."""

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        settings.configure_keras()
        run(make_task())

    app.run(start)


def run(task):
    """Trains as the flags say.

    Args:
        task: an object with

            trainer               string, the module that defines it
            name                  string, names the default run folder
            examples              number of training images in an epoch
            classes, class_names  number of classes, and their names or None
            skipped               set of the names of the damaged images that it skipped
            default_line_search   "online" or "none", for --line_search=auto
            identity              dict of its own flags that decide what a run computes
            check()               raises ValueError for flags that do not fit each other
            schedule(plan)        the learning-rate schedule
            load()                loads the data
            model()               the Keras model
            training_batches(plan, rank, seed, epoch, first_update), test_batches(rank, workers)
    """
    logging.set_verbosity(logging.WARNING)
    if not workers.is_elastic():  # there SIGTERM takes one worker, and the others go on
        preemption.watch()
    cluster = workers.connect()
    folder = pathlib.Path(FLAGS.output_dir or pathlib.Path("runs", _folder_name(task)))
    failure = None
    try:
        if FLAGS.workers and not FLAGS.dry_run:
            raise ValueError("--workers is for --dry_run: a launcher decides how many there are")
        task.check()
        plan = _plan(task, FLAGS.workers or cluster.size())
        if not FLAGS.dry_run:
            task.load()
    except (ValueError, OSError) as error:
        failure = error
    # Elastic workers may not communicate yet.
    _end_if_any_failed(failure, workers.OneProcess() if workers.is_elastic() else cluster)

    keras.config.set_dtype_policy(FLAGS.dtype_policy)
    if FLAGS.dry_run:
        if cluster.rank() == 0:
            print("\n".join(dry_run.description(task, plan)))
        return
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(FLAGS.seed)
    optimizer = settings.optimizer(task.schedule(plan), task.default_line_search)
    if FLAGS.dtype_policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    compression = None if FLAGS.compression == "none" else FLAGS.compression
    trainer = loop.Trainer(
        task.model(), optimizer, cluster, FLAGS.jit_compile, compression, FLAGS.label_smoothing
    )
    try:
        if workers.is_elastic():
            # Horovod: called again after each change of workers
            state = cluster.ElasticState(trainer.state(), restored=False, record={})
            cluster.elastic_run(_train)(state, task, trainer, cluster, folder)
        else:
            _train(OneSession(), task, trainer, cluster, folder)
    except preemption.Preempted:
        if cluster.rank() == 0:
            print("stopped by SIGTERM, state saved: the same command goes on", flush=True)
        raise SystemExit(preemption.EXIT_STATUS) from None
    except KeyboardInterrupt:
        if cluster.rank() == 0:
            print("interrupted: the same command goes on from the last checkpoint", flush=True)
        raise SystemExit(130) from None
    except (OSError, DamagedImageError) as error:
        _end_if_any_failed(f"worker {cluster.rank()}: {error}", workers.OneProcess())


class OneSession:
    """What `nlcg_tf.horovod.ElasticState` is for elastic workers, where the workers stay."""

    def __init__(self):
        self.restored = False
        self.record = {}


def _train(state, task, trainer, cluster, folder):
    """Trains with the workers that there are now."""
    rank = cluster.rank()
    identity = {**settings.identity(), **task.identity}
    reporter, checkpoints, failure = reporting.Silent(), None, None
    try:
        plan = _plan(task, cluster.size())
    except ValueError as error:
        _end_if_any_failed(error, cluster)
    trainer.divide(plan)
    if rank == 0:
        try:
            reporter = reporting.Reporter(folder, plan.epochs)
            reporter.lock()
            checkpoints = Checkpoints(
                folder / "checkpoints", FLAGS.keep_checkpoints, **trainer.objects()
            )
            if not state.restored:
                _restore(checkpoints, identity, state, reporter.say)
            done = int(trainer.updates.numpy())
            lines = dry_run.summary(task, trainer.model, plan, done)
            described = {"trainer": task.trainer, "classes": task.classes}
            described.update(_own_flags(), class_names=task.class_names)
            if FLAGS.data_dir and os.path.isdir(FLAGS.data_dir):  # no address as gs://...
                described["data_dir"] = str(pathlib.Path(FLAGS.data_dir).absolute())
            reporter.start(described, lines, done, state.record.get("epoch", 0))
        except (ValueError, OSError) as error:
            failure = error
    _end_if_any_failed(failure, cluster)
    # Horovod: all workers start from worker 0's state
    cluster.broadcast(trainer.state())
    state.record = cluster.broadcast_object(state.record)
    trainer.share_out(cluster)
    state.restored = True

    try:
        # Horovod: name workers that keep the others waiting
        with cluster.Watch() as watch:
            summary = loop.train(
                trainer,
                loop.Examples(
                    lambda epoch, first: task.training_batches(
                        plan, rank, FLAGS.seed, epoch, first
                    ),
                    task.test_batches(rank, cluster.size()),
                    task.skipped,
                ),
                cluster,
                reporter,
                checkpoints,
                state,
                identity,
                watch,
                loop.Intervals(
                    FLAGS.log_steps,
                    FLAGS.checkpoint_steps,
                    FLAGS.commit_steps if workers.is_elastic() else None,
                    FLAGS.evaluation_epochs,
                ),
            )
        summary.update(parameters=dry_run.parameters(trainer.model), seed=FLAGS.seed)
        reporter.finish(summary)
    finally:
        reporter.close()


def _plan(task, size):
    batch, per_worker = FLAGS.global_batch_size, FLAGS.per_worker_batch_size
    if workers.is_elastic():
        per_worker = divide(batch, per_worker or batch, size)
    elif per_worker is None:
        if batch % size:
            raise ValueError(f"--global_batch_size={batch} is not a multiple of {size} workers")
        per_worker = batch // size
    return make_plan(task.examples, batch, per_worker, size, FLAGS.epochs)


def _own_flags():
    """The trainer's flags by their names, without those of absl and TensorFlow."""
    values = FLAGS.flag_values_dict()
    modules = {name: FLAGS.find_module_defining_flag(name) for name in values}
    own = [n for n in values if modules[n] == sys.argv[0] or modules[n].startswith("trainers.")]
    return {name: values[name] for name in own}


def _folder_name(task):
    return f"{task.name}-{FLAGS.optimizer}-{FLAGS.global_batch_size}-seed{FLAGS.seed}"


def _restore(checkpoints, identity, state, say):
    """Restores the newest whole checkpoint, if there is one.

    Raises:
        ValueError: if it is of a run with other flags, or all are damaged.
    """
    path, meta = checkpoints.newest(say)
    if path is None:
        return
    before = meta.get("identity", {})
    changed = [name for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} is of a run with other flags: "
            + ", ".join(f"--{name} was {before.get(name)}, is {identity[name]}" for name in changed)
            + ". Choose another --output_dir, or remove this one to start anew"
        )
    checkpoints.restore(path)
    state.record = meta["record"]
    say(f"resuming from {path}")


def _end_if_any_failed(failure, cluster):
    """Ends all workers, with what went wrong on any of them, unless all are well."""
    # Horovod: if one worker cannot begin, all end
    failures = cluster.allgather_object(failure and str(failure))
    if not any(failures):
        return
    if cluster.rank() == 0:
        for rank, failure in enumerate(failures):
            # What is wrong everywhere is said once.
            if failure and (rank == 0 or failure != failures[0]):
                where = f"worker {rank}: " if rank else ""
                print(f"error: {where}{failure}", file=sys.stderr, flush=True)
    raise SystemExit(2)
