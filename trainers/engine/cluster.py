"""The workers of a run: Horovod's, or this process alone."""

import contextlib
import os

import tensorflow as tf

# How each launcher tells a process the size of its job (Horovod, Open MPI, MPICH and SLURM).
SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


class OneProcess:
    """The functions of `nlcg_tf.horovod` that a trainer uses, for a single worker."""

    def rank(self):
        return 0

    def size(self):
        return 1

    def DistributedOptimizer(self, optimizer, compression=None, average_with=(), shard=False):
        return optimizer

    def broadcast(self, variables):
        pass

    def broadcast_object(self, value):
        return value

    def allgather_object(self, value):
        return [value]

    def sum_over_workers(self, values):
        return [float(value) for value in values]

    def average_moving_statistics(self, model):
        pass

    def check_identical(self, variables):
        pass

    def Watch(self):
        return _NoWatch()


class _NoWatch(contextlib.nullcontext):
    def __enter__(self):
        return self

    def tick(self):
        pass


def is_elastic():
    """Whether workers of this job may come and go: horovodrun with --min-np or --max-np."""
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def _number_in(variable):
    text = os.environ.get(variable) or "1"
    if not text.isdigit():
        raise SystemExit(f"error: {variable} must be a number of workers. Received: {text!r}")
    return int(text)


def connect():
    """Joins the job that this process was launched in.

    Returns:
        `nlcg_tf.horovod`, initialised, or a `OneProcess`.

    Raises:
        SystemExit: if a launcher started several processes that Horovod cannot connect, or if a
            variable of the environment, where a launcher says how many there are, is no number.
    """
    launched = max(map(_number_in, SIZE_VARIABLES))
    if launched == 1 and not is_elastic():
        return OneProcess()
    from nlcg_tf import horovod

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        # Each millisecond Horovod's own thread would take time from the cores that compute.
        os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
    # Horovod: initialise, and pin one GPU to each process of a machine
    horovod.init()
    if horovod.size() != launched and not is_elastic():
        raise SystemExit(
            f"error: {launched} processes were launched, but Horovod connects {horovod.size()}. "
            "Under mpirun or srun Horovod must be built with MPI (see docs/cluster.md); "
            "horovodrun --gloo works without."
        )
    if gpus:
        tf.config.set_visible_devices(gpus[horovod.local_rank() % len(gpus)], "GPU")
    # Workers that share the cores of a machine would slow each other down.
    threads = max(1, len(os.sched_getaffinity(0)) // horovod.local_size())
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    return horovod
