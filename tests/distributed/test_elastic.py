"""Workers that come and go under horovodrun's elastic engine, on one machine with two names."""

import json
import signal
import subprocess
import time

import psutil
import pytest

from distributed.launch import ROOT, TRAINER, environment, needs_horovod, records, wait_for

COMMIT_STEPS = 4
HOSTS = ("localhost:1\n", "127.0.0.1:1\n")


class Job:
    """An elastic training whose hosts the test decides."""

    def __init__(self, folder, hosts, epochs):
        self.hosts, self.run = folder / "hosts", folder / "run"
        self.hosts.write_text("".join(hosts))
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self.hosts}\n")
        script.chmod(0o755)
        command = ["horovodrun", "--gloo", "-np", len(hosts), "--min-np", 1, "--max-np", 2]
        command += ["--network-interfaces", "lo", "--host-discovery-script", script]
        command += [*TRAINER, "--global_batch_size=256", "--per_worker_batch_size=64"]
        command += [f"--epochs={epochs}", "--log_steps=1", f"--commit_steps={COMMIT_STEPS}"]
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
            command = process.cmdline()
            if "trainers.cifar" in command and "python" in command[0]:
                found[process.environ()["HOROVOD_HOSTNAME"]] = process
        return found

    def finish(self):
        assert self.process.wait(timeout=240) == 0, self.log.read_text()[-4000:]
        return self.log.read_text()


def check_curve(folder, updates):
    """Every update is in the log once, in order, and the loss falls."""
    steps = records(folder, "step")
    assert [record["update"] for record in steps] == list(range(1, updates + 1))
    epochs = records(folder, "epoch")
    assert [record["epoch"] for record in epochs] == list(range(1, updates // 5 + 1))
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]


@needs_horovod
@pytest.mark.parametrize("lost", ["127.0.0.1", "localhost"])
def test_a_lost_worker_costs_the_updates_since_the_last_commit(lost, tmp_path):
    """Either worker: the second, and the first, which logs and saves."""
    job = Job(tmp_path, HOSTS, epochs=20)
    job.wait_for_updates(12)
    job.workers()[lost].send_signal(signal.SIGKILL)
    killed_at = records(job.run, "step")[-1]["update"]
    log = job.finish()
    lines = [line.partition(">:")[2] for line in log.splitlines() if "micro-step(s) x" in line]
    assert "256 = 2 worker(s) x 2 micro-step(s) x 64" in lines[0]
    assert "256 = 1 worker(s) x 4 micro-step(s) x 64" in lines[1]
    went_on = int(lines[1].rpartition("after update ")[2])
    assert 12 - COMMIT_STEPS <= went_on and killed_at - went_on <= COMMIT_STEPS
    check_curve(job.run, 100)
    assert json.loads((job.run / "summary.json").read_text())["workers"] == 1


@needs_horovod
def test_a_worker_that_joins_is_used(tmp_path):
    job = Job(tmp_path, HOSTS[:1], epochs=400)
    job.wait_for_updates(5)
    began = time.time()
    job.hosts.write_text("".join(HOSTS))
    joined = "256 = 2 worker(s) x 2 micro-step(s) x 64"
    wait_for(lambda: joined in job.log.read_text(), job.process, job.log)
    # Enough of it: what matters is that it trains with both.
    updates = len(records(job.run, "step"))
    job.wait_for_updates(updates + 10)
    print(f"joined after {time.time() - began:.0f} s, at update {updates}")
    job.process.terminate()
    job.process.wait(timeout=60)
    steps = records(job.run, "step")
    assert [record["update"] for record in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
