"""The training loop: virtual batches, evaluation, checkpoints; no data set, no model."""

import collections.abc
import contextlib
import dataclasses
import pathlib
import time

import keras
import tensorflow as tf

from trainers import preemption
from trainers.evaluation import Evaluator

AVERAGE_DECAY = 0.9999


class Trainer:
    """Trains a classifier; one update takes `plan.micro_steps` micro-batches on each worker.

    Args:
        model: `keras.Model` from images to logits.
        optimizer: `keras.optimizers.Optimizer`.
        workers: see `trainers.workers`.
        jit_compile: whether XLA compiles the forward and backward pass.
        compression: of gradients between workers; see `nlcg_tf.horovod.DistributedOptimizer`.
        label_smoothing: float, how much of each label is spread evenly over all classes.
    """

    def __init__(
        self, model, optimizer, workers, jit_compile=False, compression=None, label_smoothing=0.0
    ):
        self.model = model
        self.evaluate = Evaluator(model)
        self._label_smoothing = label_smoothing
        self.weights = model.trainable_variables
        # This update's mean loss, and whether a worker was told to stop.
        self._signals = [tf.Variable(0.0, name=name) for name in ("loss", "stop")]
        # Horovod: average the gradients, and with them the signals
        self.optimizer = workers.DistributedOptimizer(optimizer, compression, self._signals)
        self.optimizer.build(self.weights)
        # In mixed_float16 Keras' LossScaleOptimizer is around it.
        self.inner_optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        self.averages = [tf.Variable(v) for v in self.weights]
        self.updates = tf.Variable(0, dtype=tf.int64)
        # Loss, correct and seen examples, summed over the epoch's updates and over this one.
        self.epoch_sums = tf.Variable(tf.zeros(3, tf.float64))
        self._update_sums = tf.Variable(tf.zeros(3, tf.float64))
        self._gradient_sums = [tf.Variable(tf.zeros_like(v)) for v in self.weights]
        self._loss_sum = tf.Variable(0.0)
        self._jit_compile = jit_compile

    def divide(self, plan):
        """Sets the `BatchPlan`; what depends on the number of workers is traced anew."""
        self.plan = plan
        self.gradients = tf.function(self._gradients, jit_compile=self._jit_compile)
        self.micro_step = tf.function(self._micro_step)
        self.apply = tf.function(self._apply)
        self._forget_micro_steps()

    def _gradients(self, images, labels):
        with tf.GradientTape() as tape:
            logits = self.model(images, training=True)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            if self._label_smoothing:
                even = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)
                losses += self._label_smoothing * (even - losses)
            loss = tf.reduce_mean(losses) + tf.add_n(self.model.losses or [0.0])
            scaled = loss * getattr(self.optimizer, "dynamic_scale", 1.0)
        correct = tf.reduce_sum(tf.cast(tf.math.in_top_k(labels, logits, 1), tf.float32))
        return loss, correct, tape.gradient(scaled, self.weights)

    def _micro_step(self, images, labels):
        """Adds one micro-batch to the gradient and loss of the virtual batch."""
        loss, correct, gradients = self.gradients(images, labels)
        for total, gradient in zip(self._gradient_sums, gradients):
            total.assign_add(gradient)
        self._loss_sum.assign_add(loss)
        seen = tf.cast(tf.shape(labels)[0], tf.float32)
        self._update_sums.assign_add(tf.cast([loss * seen, correct, seen], tf.float64))

    def _apply(self, stop):
        """One update with the mean over the virtual batch.

        Args:
            stop: scalar tensor, 1 if this worker was told to stop, otherwise 0.

        Returns:
            `(loss, stop)`, both averaged over the workers.
        """
        loss = self._loss_sum / self.plan.micro_steps
        for signal, value in zip(self._signals, (loss, stop)):
            signal.assign(value)
        if hasattr(self.inner_optimizer, "observe_loss"):
            self.inner_optimizer.observe_loss(loss)
        gradients = [total / self.plan.micro_steps for total in self._gradient_sums]
        self.optimizer.apply(gradients, self.weights)
        n = tf.cast(self.updates, tf.float32)
        decay = tf.minimum(AVERAGE_DECAY, (1 + n) / (10 + n))
        for average, weight in zip(self.averages, self.weights):
            average.assign_sub((1 - decay) * (average - weight))
        self.epoch_sums.assign_add(self._update_sums)
        self._forget_micro_steps()
        self.updates.assign_add(1)
        return [signal.read_value() for signal in self._signals]

    def _forget_micro_steps(self):
        for total in [*self._gradient_sums, self._loss_sum, self._update_sums]:
            total.assign(tf.zeros_like(total))

    def objects(self):
        """What a checkpoint holds."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "averages": self.averages,
            "updates": self.updates,
            "epoch_sums": self.epoch_sums,
        }

    def variables(self):
        """Everything that must be equal on all workers."""
        return [*self.model.variables, *self.optimizer.variables, *self.averages]

    def state(self):
        """The variables of `objects()`."""
        return [*self.variables(), self.updates, self.epoch_sums]

    @contextlib.contextmanager
    def gathered(self, workers):
        """Context in which each worker holds the state of all, to be saved."""
        # Horovod: each worker's batch norm saw its own part of each batch
        workers.average_moving_statistics(self.model)
        self.epoch_sums.assign(workers.sum_over_workers(self.epoch_sums.numpy().tolist()))
        try:
            yield
        finally:
            self.share_out(workers)

    def share_out(self, workers):
        """Leaves to worker 0 the sums over the epoch, which all hold."""
        if workers.rank() > 0:
            self.epoch_sums.assign([0.0] * 3)

    def diagnostics(self, done):
        """NLCG's; in mixed_float16 the loss scale, and how many of `done` updates overflowed."""
        figures = {}
        if hasattr(self.inner_optimizer, "diagnostics"):
            figures.update(self.inner_optimizer.diagnostics())
        if hasattr(self.optimizer, "dynamic_scale"):
            figures["loss_scale"] = float(self.optimizer.dynamic_scale)
            figures["overflowed_updates"] = done - int(self.optimizer.iterations)
        return figures

    def learning_rate(self):
        return float(keras.ops.convert_to_numpy(self.optimizer.learning_rate))

    def evaluate_averages(self, batches, workers):
        """`evaluate` with the moving average of the weights in place of the weights."""
        weights = [tf.convert_to_tensor(v) for v in self.weights]
        self._assign(self.averages)
        try:
            return self.evaluate(batches, workers)
        finally:
            self._assign(weights)

    def _assign(self, values):
        for variable, value in zip(self.weights, values):
            variable.assign(value)


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


def train(
    trainer,
    examples,
    workers,
    reporter,
    checkpoints,
    state,
    identity,
    watch,
    intervals,
):
    """Trains from the trainer's current update to the end of its plan.

    Args:
        trainer: a `Trainer`.
        examples: an `Examples`.
        workers: see `trainers.workers`.
        reporter: see `trainers.reporting`.
        checkpoints: a `Checkpoints` on worker 0, `None` elsewhere.
        state: object with `record`, the record of the last epoch that is complete (`{}` before the
            first), and `commit()`.
        identity: JSON object to be saved with each checkpoint.
        watch: object with `tick()`, called in each micro-step.
        intervals: an `Intervals`.

    Returns:
        The summary of the run, a dict.

    Raises:
        preemption.Preempted: on all workers, with the state saved, if one was told to stop.
        OSError: on all workers, if worker 0 cannot write.
    """
    plan, began = trainer.plan, time.perf_counter()
    done = started_from = int(trainer.updates.numpy())
    stopped = tf.constant(0.0)

    skipped = set(state.record.get("skipped_images", []))

    def note_skipped():
        skipped.update(*workers.allgather_object(sorted(examples.skipped)))
        state.record = {**state.record, "skipped_images": sorted(skipped)}

    def save():
        nonlocal clock
        failure, saving = None, time.perf_counter()
        note_skipped()
        with trainer.gathered(workers):
            try:
                if checkpoints is not None:
                    checkpoints.save(done, epoch, {"identity": identity, "record": state.record})
            except (OSError, tf.errors.OpError) as error:
                failure = error
        # Horovod: nobody goes on, or leaves, before worker 0 has saved
        if sum(workers.sum_over_workers([failure is not None])):
            raise OSError(f"cannot write a checkpoint: {failure or 'see worker 0'}")
        clock += time.perf_counter() - saving

    def commit():
        note_skipped()
        with trainer.gathered(workers):
            state.commit()

    def note_begun_epoch():
        """So that an epoch's throughput is that of all its updates, whatever interrupts it."""
        state.record = {**state.record, "begun_seconds": time.perf_counter() - clock}

    def stop_if_told():
        if float(stopped):
            note_begun_epoch()
            save()
            raise preemption.Preempted

    for epoch in range(state.record.get("epoch", 0), plan.epochs):
        first = done - epoch * plan.updates_per_epoch
        reporter.begin_epoch(epoch, plan.updates_per_epoch, first)
        # When this epoch would have begun without the time between its parts and in checkpoints.
        clock = time.perf_counter() - state.record.get("begun_seconds", 0.0)
        batches = iter(examples.training_batches(epoch, first))
        for _ in range(first, plan.updates_per_epoch):
            # Before the next micro-step, which changes batch norm's statistics.
            stop_if_told()
            for _ in range(plan.micro_steps):
                trainer.micro_step(*next(batches))
                watch.tick()
            done += 1
            logged = done % intervals.log_steps == 0 or done == 1
            # Reading a value makes the host wait for the device: only where it is shown.
            rate = trainer.learning_rate() if logged else None
            loss, stopped = trainer.apply(tf.constant(float(preemption.requested())))
            if logged:
                reporter.step(_step_record(trainer, epoch, done, loss, rate))
            reporter.progress(loss)
            if done == started_from + 1:
                workers.check_identical(_without_statistics(trainer))
            if done % plan.updates_per_epoch:  # a whole epoch is saved with its record
                if intervals.checkpoint_steps and done % intervals.checkpoint_steps == 0:
                    note_begun_epoch()
                    save()
                if intervals.commit_steps and done % intervals.commit_steps == 0:
                    note_begun_epoch()
                    commit()
        stop_if_told()
        speed = plan.updates_per_epoch * plan.global_batch_size / (time.perf_counter() - clock)
        workers.average_moving_statistics(trainer.model)
        workers.check_identical(trainer.variables())
        record = {"epoch": epoch + 1, "update": done, "images_per_second": speed}
        record.update(_training_means(trainer, workers))
        record.update(trainer.diagnostics(done))
        if epoch + 1 == plan.epochs or (epoch + 1) % intervals.evaluation_epochs == 0:
            record.update(_evaluate(trainer, examples.test_batches, workers))
        reporter.epoch(record)
        trainer.epoch_sums.assign(tf.zeros_like(trainer.epoch_sums))
        state.record = record
        epoch += 1
        save()
        if intervals.commit_steps:
            commit()
    return {
        **state.record,
        "updates": done,
        "skipped_images": len(skipped),
        "seconds": time.perf_counter() - began,
        "workers": plan.workers,
        "micro_steps": plan.micro_steps,
        "global_batch_size": plan.global_batch_size,
        "peak_memory_bytes": _peak_memory(workers),
    }


def _peak_memory(workers):
    """The most memory that a worker has held, in bytes, as Linux counts it."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            own = 1024 * int(line.split()[1])
    peaks = [0] * workers.size()
    peaks[workers.rank()] = own
    return int(max(workers.sum_over_workers(peaks)))


def _step_record(trainer, epoch, done, loss, rate):
    record = {"epoch": epoch + 1, "update": done, "loss": float(loss), "learning_rate": rate}
    return {**record, **trainer.diagnostics(done)}


def _training_means(trainer, workers):
    loss_sum, correct, seen = workers.sum_over_workers(trainer.epoch_sums.numpy().tolist())
    return {"loss": loss_sum / seen, "train_top1": correct / seen}


def _evaluate(trainer, test_batches, workers):
    test_loss, top1, top5 = trainer.evaluate(test_batches, workers)
    _, averaged_top1, averaged_top5 = trainer.evaluate_averages(test_batches, workers)
    return {
        "test_loss": test_loss,
        "top1": top1,
        "top5": top5,
        "averaged_top1": averaged_top1,
        "averaged_top5": averaged_top5,
    }


def _without_statistics(trainer):
    return [*trainer.model.trainable_variables, *trainer.optimizer.variables, *trainer.averages]
