"""Workers that come and go under horovodrun's elastic engine, on one machine with two names."""

import contextlib
import json
import signal
import subprocess

import psutil

from tests.support.launch import (
    HOROVODRUN,
    ROOT,
    TRAINER,
    environment,
    needs_horovod,
    records,
    wait_for,
)

COMMIT_STEPS = 4
HOSTS = ("localhost:1\n", "127.0.0.1:1\n")


class Job:
    """An elastic training whose hosts the test decides."""

    def __init__(self, folder, hosts, epochs, *flags):
        self.hosts, self.run = folder / "hosts", folder / "run"
        self.hosts.write_text("".join(hosts))
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        script.chmod(0o755)
        command = [*HOROVODRUN, "-np", len(hosts), "--min-np", 1, "--max-np", 2]
        command += ["--network-interfaces", "lo", "--host-discovery-script", script]
        command += [*TRAINER, "--global_batch_size=256", "--per_worker_batch_size=64"]
        command += [f"--epochs={epochs}", "--log_steps=1", f"--commit_steps={COMMIT_STEPS}", *flags]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(part) for part in [*command, f"--output_dir={self.run}"]],
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for_updates(self, count):
        wait_for(lambda: len(records(self.run, "step")) >= count, self.process, self.log)

    def workers(self):
        """The worker processes by their host's name."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # the script's processes come and go
                command = process.cmdline()
                if "trainers.cifar" in command and "python" in command[0]:
                    found[process.environ()["HOROVOD_HOSTNAME"]] = process
        return found

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:  # the test has failed
            self.stop()

    def finish(self):
        assert self.process.wait(timeout=240) == 0, self.log.read_text()[-4000:]
        return self.log.read_text()


def divisions(log):
    """How the batch was divided, and after which update, each time that training began."""
    lines = [line.partition(">:")[2] for line in log.splitlines() if "micro-step(s) x" in line]
    return [(int(line.partition("256 = ")[2][0]), int(line.split()[-2])) for line in lines]


@needs_horovod
def test_the_first_worker_is_lost(tmp_path):
    """Which logs and saves: the other one does so from then on."""
    with Job(tmp_path, HOSTS, epochs=10) as job:
        job.wait_for_updates(12)
        job.workers()["localhost"].send_signal(signal.SIGKILL)
        killed_at = records(job.run, "step")[-1]["update"]
        (both, _), (one, went_on) = divisions(job.finish())
        assert (both, one) == (2, 1)
        assert 12 - COMMIT_STEPS <= went_on and killed_at - went_on <= COMMIT_STEPS
        # Every update is in the log once, in order, and the loss falls.
        assert [record["update"] for record in records(job.run, "step")] == list(range(1, 51))
        epochs = records(job.run, "epoch")
        assert [record["epoch"] for record in epochs] == list(range(1, 11))
        assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
        losses = [record["loss"] for record in records(job.run, "step")]
        for epoch in epochs:
            own = losses[5 * epoch["epoch"] - 5 : 5 * epoch["epoch"]]
            assert abs(epoch["loss"] - sum(own) / 5) < 1e-5
        summary = json.loads((job.run / "summary.json").read_text())
        assert (summary["workers"], summary["micro_steps"]) == (1, 4)


@needs_horovod
def test_a_worker_joins_and_is_lost_again(tmp_path):
    """And the optimizer's state, of which each has a part, is divided anew each time."""
    with Job(tmp_path, HOSTS[:1], 1000, "--shard_optimizer") as job:
        job.wait_for_updates(5)
        job.hosts.write_text("".join(HOSTS))
        wait_for(lambda: len(divisions(job.log.read_text())) == 2, job.process, job.log)
        job.wait_for_updates(len(records(job.run, "step")) + 12)
        job.workers()["127.0.0.1"].send_signal(signal.SIGKILL)
        killed_at = records(job.run, "step")[-1]["update"]
        job.wait_for_updates(killed_at + COMMIT_STEPS)
        job.stop()
        (one, _), (both, joined), (again, went_on) = divisions(job.log.read_text())
        assert (one, both, again) == (1, 2, 1)
        assert joined + 12 - COMMIT_STEPS <= went_on and killed_at - went_on <= COMMIT_STEPS
        steps = records(job.run, "step")
        assert [record["update"] for record in steps] == list(range(1, len(steps) + 1))
        assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
