"""Worker processes that can be asked for updates, and that stand still meanwhile."""

import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Connection

import numpy as np

WORKERS = 2
BYTES = [4 << shift for shift in (0, 10, 14, 16, 18, 20, 22, 24)]


def common_rates(stamps):
    """Updates per second of each process, in the time in which all were at work.

    Args:
        stamps: for each process, the moments at which its updates were done.
    """
    begin, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    if begin >= end:
        raise RuntimeError("one process was done before another had begun: the machine is too busy")
    done = [np.interp([begin, end], s, np.arange(len(s))) for s in stamps]
    return [float(last - first) / (end - begin) for first, last in done]


class Worker:
    """What a worker process can be asked for: the methods, by name."""

    def __init__(self, options):
        import tensorflow as tf

        from trainers.engine.cluster import connect

        self.options, self.cluster = options, connect()
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        rng = np.random.default_rng(self.cluster.rank())
        self.images = tf.constant(rng.normal(size=(options.batch, 32, 32, 3)), tf.float32)
        self.labels = tf.constant(rng.integers(0, 100, options.batch), tf.int32)
        self.go_on = tf.constant(0.0)

    @functools.cache  # noqa: B019
    def trainer(self, k):
        import nlcg_tf
        from trainers.engine.plan import make_plan
        from trainers.engine.trainer import Trainer
        from trainers.models.cifar_resnet import cifar_resnet

        size, batch = self.cluster.size(), self.options.batch
        model = cifar_resnet(self.options.depth, (32, 32, 3), 100)
        trainer = Trainer(model, nlcg_tf.NLCG(0.01), self.cluster)
        trainer.divide(make_plan(50_000, size * k * batch, batch, size, epochs=1))
        self.cluster.broadcast(trainer.variables())
        return trainer

    def updates(self, k, count, start=0.0):
        """Does `count` updates from the moment `start` on; returns when each was done."""
        trainer, stamps = self.trainer(k), []
        time.sleep(max(0.0, start - time.monotonic()))
        for _ in range(count):
            for _ in range(k):
                trainer.micro_step(self.images, self.labels)
            float(trainer.apply(self.go_on)[0])  # waits
            stamps.append(time.monotonic())
        return stamps

    def calm_timeline(self):
        """Lets Horovod's timeline thread, which polls without rest, run on an idle core only."""

        def ticks():
            stats = {int(t.name): (t / "stat").read_text() for t in tasks.iterdir()}
            return {t: sum(map(int, s.rpartition(")")[2].split()[11:13])) for t, s in stats.items()}

        tasks = pathlib.Path("/proc/self/task")
        before = ticks()
        time.sleep(1)
        spent = {thread: now - before.get(thread, now) for thread, now in ticks().items()}
        if self.cluster.rank() == 0:  # who alone has that thread
            busiest = max(spent, key=spent.get)
            os.sched_setscheduler(busiest, os.SCHED_IDLE, os.sched_param(0))

    def trace(self, k, count, file):
        import horovod.tensorflow as hvd

        hvd.start_timeline(file)
        time.sleep(0.5)
        self.updates(k, count)
        time.sleep(0.5)
        hvd.stop_timeline()
        time.sleep(0.5)

    def allreduces(self, repeats):
        """Seconds of each all-reduce: repeats x sizes."""
        import horovod.tensorflow as hvd

        vectors = {f"{size} bytes": np.ones(size // 4, np.float32) for size in BYTES}
        seconds = np.zeros((2 + repeats, len(BYTES)))
        for row in seconds:
            for i, (name, vector) in enumerate(vectors.items()):
                hvd.allreduce(np.float32(0), name="all are here")
                began = time.monotonic()
                hvd.allreduce(vector, op=hvd.Sum, name=name).numpy()
                row[i] = time.monotonic() - began
        return seconds[2:]


def work(options):
    """The life of a worker process."""
    connection, worker = Client(options.worker), Worker(options)
    connection.send(os.getpid())
    with contextlib.suppress(EOFError):
        while True:
            request, *arguments = connection.recv()
            connection.send(getattr(worker, request)(*arguments))


class Team:
    """Two worker processes, which stand still (SIGSTOP) while nothing is asked of them.

    Args:
        launcher: command that starts both workers, or `None`: start two independent processes.
    """

    def __init__(self, options, launcher=None, **environment):
        self.folder = tempfile.TemporaryDirectory()
        address, self.log = (pathlib.Path(self.folder.name, name) for name in ("socket", "log"))
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(address))
        server.listen()
        server.settimeout(1)
        command = [sys.executable, "-m", "scripts.bench.scaling", f"--worker={address}"]
        command += [f"--depth={options.depth}", f"--batch={options.batch}"]
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
        with self.log.open("w") as log:
            # A session of its own for each, as horovodrun gives its workers: the scheduler shares
            # out the cores among sessions.
            settings = dict(env=environment, stdout=log, stderr=log, start_new_session=True)
            self.processes = [
                subprocess.Popen([*(launcher or []), *command], **settings)
                for _ in range(1 if launcher else WORKERS)
            ]
        self.connections = []
        while len(self.connections) < WORKERS:
            with contextlib.suppress(TimeoutError):
                self.connections.append(Connection(server.accept()[0].detach()))
            if any(process.poll() is not None for process in self.processes):
                self._fail()
        self.pids = [self._receive(connection) for connection in self.connections]
        self._signal(signal.SIGSTOP)

    def ask(self, *request, members=WORKERS):
        """Asks the first `members` workers for the same; returns their answers."""
        self._signal(signal.SIGCONT)
        for connection in self.connections[:members]:
            connection.send(request)
        answers = [self._receive(connection) for connection in self.connections[:members]]
        self._signal(signal.SIGSTOP)
        return answers

    def rates(self, k, count, members=WORKERS):
        """Updates per second of each worker; all start at the same moment."""
        return common_rates(self.ask("updates", k, count, time.monotonic() + 0.1, members=members))

    def _receive(self, connection):
        try:
            return connection.recv()
        except EOFError:
            self._fail()

    def _fail(self):
        raise RuntimeError(f"a worker ended:\n{self.log.read_text()[-3000:]}")

    def _signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGCONT)
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.wait(60)
        self.folder.cleanup()


def horovod_team(options, **environment):
    # Longer than the others' turns, in which it stands still.
    environment["HOROVOD_GLOO_TIMEOUT_SECONDS"] = "600"
    horovodrun = pathlib.Path(sys.executable).with_name("horovodrun")
    return Team(options, [str(horovodrun), "--gloo", "-np", str(WORKERS)], **environment)
