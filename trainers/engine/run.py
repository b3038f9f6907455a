"""One run of a trainer, from flags to summary; the trainers differ in data, model and schedule."""

import pathlib
import sys

import keras
import tensorflow as tf
from absl import app, flags, logging

from trainers.data.damage import DamagedImageError
from trainers.engine import folder, forecast, preemption
from trainers.engine.checkpoints import Checkpoints
from trainers.engine.cluster import OneProcess, connect, is_elastic
from trainers.engine.loop import Examples, Intervals, Loop
from trainers.engine.plan import divide, make_plan
from trainers.engine.reporter import Reporter, Silent
from trainers.engine.trainer import Trainer
from trainers.flags import FREE, identity, optimizer, own_flags

FLAGS = flags.FLAGS


def main(make_task):
    """The program of a trainer; `make_task` makes its `Task` once the flags are read."""

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        configure_keras()
        run(make_task())

    app.run(start)


def configure_keras():
    """Makes Keras independent of the user's keras.json.

    Raises:
        SystemExit: if its backend is another than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise SystemExit(
            "error: the trainers need KERAS_BACKEND=tensorflow. Keras' backend is "
            f"{keras.backend.backend()}, by that variable or keras.json"
        )
    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")


def run(task):
    """Trains a `Task` as the flags say."""
    logging.set_verbosity(logging.WARNING)
    preemption.watch()
    cluster = connect()
    # Elastic workers may not communicate yet.
    plan = _prepare(
        task, FLAGS.workers or cluster.size(), OneProcess() if is_elastic() else cluster
    )
    keras.config.set_dtype_policy(FLAGS.dtype_policy)
    if FLAGS.dry_run:
        if cluster.rank() == 0:
            print("\n".join(forecast.forecast(task, plan)))
        return
    trainer = failure = None
    try:
        trainer = _make_trainer(task, plan, cluster)
    except ValueError as error:
        if not FLAGS.shard_optimizer:
            raise
        failure = f"--shard_optimizer: {error}"
    _end_if_any_failed(failure, OneProcess() if is_elastic() else cluster)
    try:
        if is_elastic():
            # Horovod: called again after each change of workers
            state = cluster.ElasticState(trainer.state(), restored=False, record={})
            cluster.elastic_run(_train)(state, task, trainer, cluster)
        else:
            _train(OneSession(), task, trainer, cluster)
    except preemption.Preempted:
        if cluster.rank() == 0:
            print("stopped by SIGTERM, state saved: the same command goes on", flush=True)
        raise SystemExit(preemption.EXIT_STATUS) from None
    except KeyboardInterrupt:
        if cluster.rank() == 0:
            print("interrupted: the same command goes on from the last checkpoint", flush=True)
        raise SystemExit(130) from None
    except (OSError, DamagedImageError) as error:
        _end_if_any_failed(f"worker {cluster.rank()}: {error}", OneProcess())


def _prepare(task, size, cluster):
    """Checks the flags and loads the data; returns the plan for so many workers."""
    plan = failure = None
    try:
        if FLAGS.workers and not FLAGS.dry_run:
            raise ValueError("--workers is for --dry_run: a launcher decides how many there are")
        task.check()
        plan = _plan(task, size)
        if FLAGS.dry_run:
            _check_sharding(task, plan)
        else:
            task.load()
    except (ValueError, OSError) as error:
        failure = error
    _end_if_any_failed(failure, cluster)
    return plan


def _check_sharding(task, plan):
    """What a run would refuse when it makes its optimizer, which a dry run does not distribute."""
    if not FLAGS.shard_optimizer or plan.workers == 1:  # a single worker ignores the flag
        return
    try:
        from nlcg_tf.horovod.shardable import why_not
    except ImportError:
        return  # without Horovod it cannot be told
    if reason := why_not(_optimizer(task, plan), FLAGS.compression):
        raise ValueError(f"--shard_optimizer: {reason}")


def _optimizer(task, plan):
    chosen = optimizer(task.schedule(plan), task.default_line_search)
    is_scaled = FLAGS.dtype_policy == "mixed_float16"
    return keras.optimizers.LossScaleOptimizer(chosen) if is_scaled else chosen


def _make_trainer(task, plan, cluster):
    if FLAGS.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(FLAGS.seed)
    return Trainer(
        task.model(),
        _optimizer(task, plan),
        cluster,
        FLAGS.jit_compile,
        None if FLAGS.compression == "none" else FLAGS.compression,
        FLAGS.label_smoothing,
        FLAGS.shard_optimizer,
    )


class OneSession:
    """What `nlcg_tf.horovod.ElasticState` is for elastic workers, where the workers stay."""

    def __init__(self):
        self.restored = False
        self.record = {}


def _train(state, task, trainer, cluster):
    """Trains with the workers that there are now."""
    rank = cluster.rank()
    try:
        plan = _plan(task, cluster.size())
    except ValueError as error:
        _end_if_any_failed(error, cluster)
    trainer.divide(plan)
    reporter, checkpoints, failure = Silent(), None, None
    if rank == 0:
        try:
            if not state.restored:
                trainer.make_whole(cluster)
            reporter, checkpoints = _open_folder(state, task, trainer)
        except (ValueError, OSError) as error:
            failure = error
    _end_if_any_failed(failure, cluster)
    # Horovod: all workers start from worker 0's state
    trainer.share_out(cluster, is_divided=state.restored)
    state.record = cluster.broadcast_object(state.record)
    state.restored = True

    def training_batches(epoch, first):
        return task.training_batches(plan, rank, FLAGS.seed, epoch, first)

    try:
        # Horovod: name workers that keep the others waiting
        with cluster.Watch() as watch:
            test_batches = task.test_batches(rank, cluster.size())
            loop = Loop(
                trainer=trainer,
                examples=Examples(training_batches, test_batches, task.skipped),
                cluster=cluster,
                reporter=reporter,
                checkpoints=checkpoints,
                state=state,
                identity=_identity(task),
                watch=watch,
                intervals=Intervals(
                    FLAGS.log_steps,
                    FLAGS.checkpoint_steps,
                    FLAGS.commit_steps if is_elastic() else None,
                    FLAGS.evaluation_epochs,
                ),
            )
            summary = loop.run()
        summary.update(parameters=forecast.parameters(trainer.model), seed=FLAGS.seed)
        reporter.finish(summary)
    finally:
        reporter.close()


def _open_folder(state, task, trainer):
    """Takes the run folder and goes on from its newest checkpoint, on worker 0.

    Returns:
        `(reporter, checkpoints)`.
    """
    path = pathlib.Path(FLAGS.output_dir or pathlib.Path("runs", _folder_name(task)))
    run_folder = folder.RunFolder(path, trainer.plan.epochs)
    run_folder.lock()
    reporter = Reporter(run_folder)
    checkpoints = Checkpoints(path / folder.CHECKPOINTS, FLAGS.keep_checkpoints)
    checkpoints.prepare()
    if not state.restored:
        _restore(checkpoints, _identity(task), state, trainer, reporter.say)
    done = int(trainer.updates.numpy())
    described = {"trainer": task.trainer, "classes": task.classes}
    described.update(own_flags(), class_names=task.class_names)
    if FLAGS.data_dir:
        described["data_dir"] = str(pathlib.Path(FLAGS.data_dir).absolute())
    run_folder.start(described, FREE, done, state.record.get("epoch", 0))
    reporter.start(forecast.heading(task, trainer.model, trainer.plan, done))
    return reporter, checkpoints


def _identity(task):
    return {**identity(), **task.identity}


def _plan(task, size):
    batch, per_worker = FLAGS.global_batch_size, FLAGS.per_worker_batch_size
    if is_elastic():
        per_worker = divide(batch, per_worker or batch, size)
    elif per_worker is None:
        if batch % size:
            raise ValueError(f"--global_batch_size={batch} is not a multiple of {size} workers")
        per_worker = batch // size
    return make_plan(task.examples, batch, per_worker, size, FLAGS.epochs)


def _folder_name(task):
    return f"{task.name}-{FLAGS.optimizer}-{FLAGS.global_batch_size}-seed{FLAGS.seed}"


def _restore(checkpoints, identity, state, trainer, say):
    """Restores the newest whole checkpoint, if there is one.

    Raises:
        ValueError: if it is of a run with other flags, or all are damaged.
    """
    path, meta = checkpoints.newest(say)
    if path is None:
        return
    # A flag that is newer than the run had its default then.
    defaults = {name: FLAGS[name].default for name in identity if name in FLAGS}
    before = {**defaults, **meta.get("identity", {})}
    changed = [name for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{path} is of a run with other flags: "
            + ", ".join(f"--{name} was {before.get(name)}, is {identity[name]}" for name in changed)
            + ". Choose another --output_dir, or remove this one to start anew"
        )
    checkpoints.restore(path, **trainer.objects())
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
