"""One run of a trainer, from flags to summary; the trainers differ in data, model and schedule."""

import math
import pathlib
import sys

import keras
from absl import flags, logging

from trainers import loop, reporting, settings, workers
from trainers.checkpoints import Checkpoints
from trainers.optimizers import make_optimizer
from trainers.plan import make_plan

FLAGS = flags.FLAGS


def run(task):
    """Trains as the flags say.

    Args:
        task: an object with

            name                  string, names the default run folder
            examples              number of training images in an epoch
            default_line_search   "online" or "none", for --line_search=auto
            identity              dict of its own flags that decide what a run computes
            check()               raises ValueError for flags that do not fit each other
            schedule(plan)        the learning-rate schedule
            load()                loads the data
            model()               the Keras model
            training_batches(plan, rank, seed, epoch, first_update), test_batches(rank, workers)
    """
    logging.set_verbosity(logging.WARNING)
    cluster = workers.connect()
    rank, size = cluster.rank(), cluster.size()
    try:
        task.check()
        plan = _plan(task, size)
        folder = pathlib.Path(FLAGS.output_dir or pathlib.Path("runs", _folder_name(task)))
        if rank == 0 and not FLAGS.resume and (folder / "metrics.jsonl").exists():
            raise ValueError(f"--output_dir={folder} holds a run: pass --resume or another folder")
        task.load()
    except (ValueError, FileNotFoundError) as error:
        _fail(error, rank)

    identity = {**settings.identity(), **task.identity}
    keras.utils.set_random_seed(FLAGS.seed)
    model = task.model()
    optimizer = make_optimizer(
        FLAGS.optimizer, task.schedule(plan), **settings.nlcg_arguments(task.default_line_search)
    )
    # Horovod: average the gradients
    optimizer = cluster.DistributedOptimizer(optimizer)
    trainer = loop.Trainer(model, optimizer, plan, FLAGS.jit_compile)

    reporter, checkpoints, resumed, failure = reporting.Silent(), None, {}, None
    if rank == 0:
        checkpoints = Checkpoints(folder / "checkpoints", **trainer.objects())
        reporter = reporting.Reporter(folder, plan.epochs)
        try:
            resumed = _restore(checkpoints, identity) if FLAGS.resume else {}
            lines = _description(task, model, plan, resumed)
            reporter.start(FLAGS.flag_values_dict(), lines, int(trainer.updates.numpy()))
        except (ValueError, OSError) as error:
            failure = error
    # Horovod: if worker 0 cannot begin, all end
    if sum(cluster.sum_over_workers([failure is not None])):
        _fail(failure, rank)
    # Horovod: all workers start from worker 0's state
    cluster.broadcast([*trainer.variables(), trainer.updates, trainer.epoch_sums])

    try:
        summary = loop.train(
            trainer,
            lambda epoch, first: task.training_batches(plan, rank, FLAGS.seed, epoch, first),
            task.test_batches(rank, size),
            cluster,
            reporter,
            checkpoints,
            FLAGS.log_steps,
            {"identity": identity, "record": resumed.get("record", {})},
        )
    except KeyboardInterrupt:
        reporter.say("interrupted: the same command with --resume goes on from the last epoch")
        raise SystemExit(130) from None
    reporter.finish({**summary, "parameters": _parameters(model), "seed": FLAGS.seed})


def _plan(task, size):
    if FLAGS.per_worker_batch_size is None and FLAGS.global_batch_size % size:
        raise ValueError(
            f"--global_batch_size={FLAGS.global_batch_size} is not a multiple of {size} workers"
        )
    return make_plan(
        task.examples,
        FLAGS.global_batch_size,
        FLAGS.per_worker_batch_size or FLAGS.global_batch_size // size,
        size,
        FLAGS.epochs,
    )


def _folder_name(task):
    return f"{task.name}-{FLAGS.optimizer}-{FLAGS.global_batch_size}-seed{FLAGS.seed}"


def _restore(checkpoints, identity):
    """Restores the newest checkpoint; returns what it says besides the state.

    Raises:
        ValueError: if there is none, or it is of a run with other flags.
    """
    saved = checkpoints.all()
    if not saved:
        raise ValueError(f"--resume: no checkpoint under {checkpoints.folder}")
    before = checkpoints.meta(saved[-1]).get("identity", {})
    changed = [name for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"--resume: {saved[-1]} is of a run with other flags: "
            + ", ".join(f"--{name} was {before.get(name)}, is {identity[name]}" for name in changed)
        )
    return {**checkpoints.restore(saved[-1]), "path": str(saved[-1])}


def _description(task, model, plan, resumed):
    lines = [
        f"{task.name}: {_parameters(model):,} parameters, {task.examples:,} training images",
        f"{FLAGS.optimizer}: batch {plan.global_batch_size:,} = {plan.workers} worker(s) x "
        f"{plan.micro_steps} micro-step(s) x {plan.per_worker_batch_size:,}; "
        f"{plan.updates:,} updates in {plan.epochs} epochs",
    ]
    return [*lines, f"resuming from {resumed['path']}"] if resumed else lines


def _parameters(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def _fail(message, rank):
    if rank == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
