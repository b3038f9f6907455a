"""Updates of a model: virtual batches, averaged weights, evaluation; no data set, no files."""

import contextlib
import functools

import keras
import tensorflow as tf

from trainers.engine import averages
from trainers.engine.evaluator import Evaluator


class Trainer:
    """Trains a classifier; one update takes `plan.micro_steps` micro-batches on each worker.

    Args:
        model: `keras.Model` from images to logits.
        optimizer: `keras.optimizers.Optimizer`.
        cluster: see `trainers.engine.cluster`.
        jit_compile: whether XLA compiles the forward and backward pass.
        compression: of gradients between workers; see `nlcg_tf.horovod.DistributedOptimizer`.
        label_smoothing: float, how much of each label is spread evenly over all classes.
        shard: whether each of several workers keeps its part of the optimizer's state only.
    """

    def __init__(
        self,
        model,
        optimizer,
        cluster,
        jit_compile=False,
        compression=None,
        label_smoothing=0.0,
        shard=False,
    ):
        self.model = model
        self.evaluate = Evaluator(model)
        self._label_smoothing = label_smoothing
        self.weights = model.trainable_variables
        # This update's mean loss, and whether a worker was told to stop.
        self._signals = [tf.Variable(0.0, name=name) for name in ("loss", "stop")]
        # Horovod: average the gradients, and with them the signals
        self.optimizer = cluster.DistributedOptimizer(optimizer, compression, self._signals, shard)
        self.optimizer.build(self.weights)
        # In mixed_float16 Keras' LossScaleOptimizer is around it.
        self.inner_optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        # One process shares with nobody.
        self._is_sharded = hasattr(self.inner_optimizer, "division")
        self._whole_optimizer = None  # on worker 0, to be saved or restored
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
        # No control flow in them hangs on tensors. To look for it takes a tenth of a start.
        function = functools.partial(tf.function, autograph=False)
        self.gradients = function(self._gradients, jit_compile=self._jit_compile)
        self.micro_step = function(self._micro_step)
        self.apply = function(self._apply)
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
        decay = averages.decay(self.updates)
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
        """What a checkpoint holds; the whole of a sharded optimizer inside of `gathered` only."""
        return {
            "model": self.model,
            "optimizer": self._whole_optimizer or self.optimizer,
            "averages": self.averages,
            "updates": self.updates,
            "epoch_sums": self.epoch_sums,
        }

    def variables(self):
        """Everything that must be equal on all workers."""
        return [*self.model.variables, *self.optimizer.variables, *self.averages]

    def trained_variables(self):
        """Those of `variables()` that do not hang on a worker's own part of the data."""
        return [*self.model.trainable_variables, *self.optimizer.variables, *self.averages]

    def state(self):
        """The variables of `objects()`."""
        return [*self.variables(), self.updates, self.epoch_sums]

    @contextlib.contextmanager
    def gathered(self, cluster, with_optimizer=False):
        """Context in which each worker holds the state of all, to be saved.

        `with_optimizer`: worker 0 also holds the whole of a sharded one.
        """
        # Horovod: each worker's batch norm saw its own part of each batch
        cluster.average_moving_statistics(self.model)
        self.epoch_sums.assign(cluster.sum_over_workers(self.epoch_sums.numpy().tolist()))
        if self._is_sharded and with_optimizer:
            self._whole_optimizer = cluster.gather_optimizer(self.optimizer)
        try:
            yield
        finally:
            self._whole_optimizer = None
            self._leave_sums_to_first(cluster)

    def make_whole(self, cluster):
        """Worker 0 is going to restore `objects()`, before all workers come to `share_out`."""
        if self._is_sharded:
            self._whole_optimizer = cluster.whole_optimizer(self.optimizer)

    def share_out(self, cluster, is_divided):
        """Gives all workers worker 0's state.

        `is_divided`: each has its part of a sharded optimizer already.
        """
        if self._is_sharded and not is_divided:
            cluster.scatter_optimizer(self.optimizer, self._whole_optimizer)
            self._whole_optimizer = None
        cluster.broadcast(self.state())
        self._leave_sums_to_first(cluster)

    def _leave_sums_to_first(self, cluster):
        """Leaves to worker 0 the sums over the epoch, which all hold."""
        if cluster.rank() > 0:
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

    def training_means(self, cluster):
        """Loss and accuracy over the epoch's updates so far, of all workers."""
        loss, correct, seen = cluster.sum_over_workers(self.epoch_sums.numpy().tolist())
        return {"loss": loss / seen, "train_top1": correct / seen}

    def test(self, batches, cluster):
        """Loss and accuracies on the test images, and those of the averaged weights."""
        loss, top1, top5 = self.evaluate(batches, cluster)
        _, averaged_top1, averaged_top5 = self.evaluate_averages(batches, cluster)
        record = {"test_loss": loss, "top1": top1, "top5": top5}
        return {**record, "averaged_top1": averaged_top1, "averaged_top5": averaged_top5}

    def evaluate_averages(self, batches, cluster):
        """`evaluate` with the moving average of the weights in place of the weights."""
        weights = [tf.convert_to_tensor(v) for v in self.weights]
        self._assign(self.averages)
        try:
            return self.evaluate(batches, cluster)
        finally:
            self._assign(weights)

    def _assign(self, values):
        for variable, value in zip(self.weights, values):
            variable.assign(value)
