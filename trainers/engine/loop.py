"""The training loop: epochs, logging, evaluation, checkpoints, commits of elastic workers."""

import collections.abc
import dataclasses
import pathlib
import time
from typing import Any

import tensorflow as tf

from trainers.engine import preemption


@dataclasses.dataclass(frozen=True)
class Examples:
    """What one worker trains and is tested on.

    Attributes:
        training_batches: function of (epoch, first update in it) to this worker's micro-batches.
        test_batches: this worker's part of the test images.
        skipped: set of the names of the damaged ones that it has skipped; grows.
    """

    training_batches: collections.abc.Callable
    test_batches: collections.abc.Iterable
    skipped: set


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How often the loop does what besides training.

    Attributes:
        log_steps: updates between two logged steps.
        checkpoint_steps: updates between two checkpoints, or `None`: after each epoch only.
        commit_steps: updates between two commits, or `None` for workers that are not elastic.
        evaluation_epochs: epochs between two evaluations on the test images.
    """

    log_steps: int
    checkpoint_steps: int | None
    commit_steps: int | None
    evaluation_epochs: int


@dataclasses.dataclass
class Loop:
    """Trains from the trainer's current update to the end of its plan.

    Attributes:
        trainer: a `Trainer`.
        examples: an `Examples`.
        cluster: see `trainers.engine.cluster`.
        reporter: see `trainers.engine.reporter`.
        checkpoints: a `Checkpoints` on worker 0, `None` elsewhere.
        state: object with `record`, the record of the last epoch that is complete (`{}` before the
            first), and `commit()`.
        identity: JSON object to be saved with each checkpoint.
        watch: object with `tick()`, called in each micro-step.
        intervals: an `Intervals`.
    """

    trainer: Any
    examples: Examples
    cluster: Any
    reporter: Any
    checkpoints: Any
    state: Any
    identity: dict
    watch: Any
    intervals: Intervals

    def run(self):
        """Trains, and returns the summary of the run, a dict.

        Raises:
            preemption.Preempted: on all workers, with the state saved, if one was told to stop.
            OSError: on all workers, if worker 0 cannot write.
        """
        began, plan = time.perf_counter(), self.trainer.plan
        self._done = self._started_from = int(self.trainer.updates.numpy())
        self._epochs = self.state.record.get("epoch", 0)
        # Horovod: whether a worker was told to stop before it could
        (self._stopped,) = self.cluster.sum_over_workers([float(preemption.requested())])
        self._skipped = set(self.state.record.get("skipped_images", []))
        while self._epochs < plan.epochs:
            self._train_epoch()
            self._end_epoch()
        return {
            **self.state.record,
            "updates": self._done,
            "skipped_images": len(self._skipped),
            "seconds": time.perf_counter() - began,
            "workers": plan.workers,
            "micro_steps": plan.micro_steps,
            "global_batch_size": plan.global_batch_size,
            "peak_memory_bytes": _peak_memory(self.cluster),
        }

    def _train_epoch(self):
        """The updates of an epoch that are left to do."""
        plan, intervals = self.trainer.plan, self.intervals
        first = self._done - self._epochs * plan.updates_per_epoch
        self.reporter.begin_epoch(self._epochs, plan.updates_per_epoch, first)
        # When this epoch would have begun without the time between its parts and in checkpoints.
        self._clock = time.perf_counter() - self.state.record.get("begun_seconds", 0.0)
        batches = iter(self.examples.training_batches(self._epochs, first))
        for _ in range(first, plan.updates_per_epoch):
            # Before the next micro-step, which changes batch norm's statistics.
            self._stop_if_told()
            for _ in range(plan.micro_steps):
                self.trainer.micro_step(*next(batches))
                self.watch.tick()
            self._update()
            if self._done % plan.updates_per_epoch == 0:
                break  # a whole epoch is saved with its record
            if intervals.checkpoint_steps and self._done % intervals.checkpoint_steps == 0:
                self._note_begun_epoch()
                self._save()
            if intervals.commit_steps and self._done % intervals.commit_steps == 0:
                self._note_begun_epoch()
                self._commit()
        self._stop_if_told()

    def _update(self):
        self._done += 1
        logged = self._done % self.intervals.log_steps == 0 or self._done == 1
        # Reading a value makes the host wait for the device: only where it is shown.
        rate = self.trainer.learning_rate() if logged else None
        loss, self._stopped = self.trainer.apply(tf.constant(float(preemption.requested())))
        if logged:
            record = {"epoch": self._epochs + 1, "update": self._done, "loss": float(loss)}
            record.update(learning_rate=rate, **self.trainer.diagnostics(self._done))
            self.reporter.step(record)
        self.reporter.progress(loss)
        if self._done == self._started_from + 1:
            # Horovod: name the first variable in which workers differ; their statistics may
            self.cluster.check_identical(self.trainer.trained_variables())

    def _end_epoch(self):
        trainer, cluster, plan = self.trainer, self.cluster, self.trainer.plan
        seconds = time.perf_counter() - self._clock
        cluster.average_moving_statistics(trainer.model)
        cluster.check_identical(trainer.variables())
        self._epochs += 1
        record = {"epoch": self._epochs, "update": self._done}
        record["images_per_second"] = plan.updates_per_epoch * plan.global_batch_size / seconds
        record.update(trainer.training_means(cluster))
        record.update(trainer.diagnostics(self._done))
        if self._epochs == plan.epochs or self._epochs % self.intervals.evaluation_epochs == 0:
            record.update(trainer.test(self.examples.test_batches, cluster))
        self.reporter.epoch(record)
        trainer.epoch_sums.assign(tf.zeros_like(trainer.epoch_sums))
        self.state.record = record
        self._save()
        if self.intervals.commit_steps:
            self._commit()

    def _save(self):
        failure, saving = None, time.perf_counter()
        self._note_skipped()
        with self.trainer.gathered(self.cluster, with_optimizer=True):
            try:
                if self.checkpoints is not None:
                    meta = {"identity": self.identity, "record": self.state.record}
                    objects = self.trainer.objects()
                    self.checkpoints.save(self._done, self._epochs, meta, **objects)
            except OSError as error:
                failure = error
        # Horovod: nobody goes on, or leaves, before worker 0 has saved
        if sum(self.cluster.sum_over_workers([failure is not None])):
            raise OSError(f"cannot write a checkpoint: {failure or 'see worker 0'}")
        self._clock += time.perf_counter() - saving

    def _commit(self):
        self._note_skipped()
        with self.trainer.gathered(self.cluster):
            self.state.commit()

    def _stop_if_told(self):
        if float(self._stopped):
            self._note_begun_epoch()
            self._save()
            raise preemption.Preempted

    def _note_begun_epoch(self):
        """So that an epoch's throughput is that of all its updates, whatever interrupts it."""
        begun = time.perf_counter() - self._clock
        self.state.record = {**self.state.record, "begun_seconds": begun}

    def _note_skipped(self):
        self._skipped.update(*self.cluster.allgather_object(sorted(self.examples.skipped)))
        self.state.record = {**self.state.record, "skipped_images": sorted(self._skipped)}


def _peak_memory(cluster):
    """The most memory that a worker has held, in bytes, as Linux counts it."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    own = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    peaks = [0] * cluster.size()
    peaks[cluster.rank()] = own
    return int(max(cluster.sum_over_workers(peaks)))
