"""Keras callbacks for several workers."""

import warnings

import horovod.tensorflow as hvd
import keras

from nlcg_tf.configurable import check_number
from nlcg_tf.horovod.averaging import Averaging
from nlcg_tf.horovod.collectives import (
    average_moving_statistics,
    broadcast,
    check_identical,
    check_root,
    shared,
    sum_metrics,
)
from nlcg_tf.horovod.sharding import AgreeingLossScale
from nlcg_tf.horovod.watch import A_STEP, LIMITS, Watch, entering, warning_after
from nlcg_tf.loss_scaling import inner_optimizers


class BroadcastVariables(keras.callbacks.Callback):
    """Starts all workers from the model and optimizer state of worker `root_rank`.

    Gradients that each worker has accumulated for an unfinished virtual batch stay its own, if all
    have done the same number of steps. Compares the weights of all workers after the first update.

    Raises:
        ValueError: when training begins, if the model is not built yet; on all workers, if their
            optimizers or the shapes of their variables differ, or if a sharded optimizer's saved
            state was not loaded on all of them; for a `root_rank` that no worker has.
        RuntimeError: on all workers after the first update, if a weight differs.
    """

    def __init__(self, root_rank: int = 0) -> None:
        super().__init__()
        self.root_rank = root_rank

    def on_train_begin(self, logs=None):
        check_root(self.root_rank)
        if not self.model.built:
            raise ValueError(
                "BroadcastVariables needs the variables before the first batch, but the model has "
                "none yet. Begin it with a keras.Input, or call model.build(input_shape) before "
                f"`fit`. Received: model={self.model.name!r}"
            )
        optimizer = self.model.optimizer
        if hvd.size() > 1 and not isinstance(optimizer, (Averaging, AgreeingLossScale)):
            warnings.warn(
                f"{type(optimizer).__name__} is no `DistributedOptimizer`: unless a train step of "
                "your own averages the gradients, the workers train apart",
                stacklevel=2,
            )
        if not optimizer.built:
            optimizer.build(self.model.trainable_variables)
        variables = [*self.model.variables, *optimizer.variables]
        is_sharded = len(shared(variables)) < len(variables)
        _compare({"optimizer": type(optimizer).__name__, "`shard`": is_sharded})
        steps = [int(keras.ops.convert_to_numpy(one._iterations)) for one in _with_inner(optimizer)]
        all_steps = hvd.allgather_object(steps)
        if all_steps == [steps] * len(all_steps):
            own = _of_one_worker(optimizer)
            variables = [v for v in variables if id(v) not in own]
        elif is_sharded:
            _refuse_shards(all_steps)
        broadcast(variables, self.root_rank)
        self._start = int(keras.ops.convert_to_numpy(optimizer.iterations))

    def on_train_batch_end(self, batch, logs=None):
        # Once: an optimizer, or a train step, that averages nothing shows in its first update.
        if self._start is None:
            return
        if int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) > self._start:
            self._start = None
            check_identical(self.model.trainable_variables)


class WatchWorkers(keras.callbacks.Callback):
    """Ends the training if workers would wait for each other forever, and names workers that hang.

    Put it first in the list of callbacks. Then the time that other callbacks take, for example to
    save a file, does not count as part of a training step. See `Watch` for the details.

    Args:
        seconds: float, after how many seconds without progress a warning names the late workers.
            Choose less than 30, because Gloo ends the training after 30 seconds of silence.

    Raises:
        ValueError: for seconds outside 0.1 to 1e6. On all workers when training begins, if they
            differ in the number of epochs, the first epoch, `gradient_accumulation_steps`,
            `steps_per_execution` or the steps of an epoch (if `fit` knows them). On all workers
            later, if one worker stops and others continue.
    """

    def __init__(self, seconds: float = 20.0) -> None:
        super().__init__()
        check_number("seconds", seconds, *LIMITS)
        self.seconds, self._watch = seconds, None

    def on_train_begin(self, logs=None):
        self._close()  # the watch of a training that was interrupted: Keras does not tell
        steps = getattr(self.model.optimizer, "gradient_accumulation_steps", None) or 1
        with warning_after(
            self.seconds,
            "the others have not begun `fit`, or have no WatchWorkers as their first callback",
        ):
            _compare(
                {
                    "number of epochs": self.params.get("epochs"),
                    "number of steps in an epoch": self.params.get("steps"),
                    "`steps_per_execution`": self.model.steps_per_execution,
                    "`gradient_accumulation_steps`": steps,
                }
            )
            # Of those that average once an update, how many steps they average after.
            optimizer = self.model.optimizer
            averages_once = isinstance(optimizer, Averaging) and not optimizer._averages_first
            self._steps = steps if averages_once else 1
            self._watch = Watch(self.seconds).__enter__()

    def on_epoch_begin(self, epoch, logs=None):
        with entering("for the next epoch"):
            _compare({"next epoch": epoch})
        # Read once an epoch: on a GPU each reading would wait for the step before.
        self._micro_step = 0
        if self._steps > 1:
            done = keras.ops.convert_to_numpy(self.model.optimizer._iterations)
            self._micro_step = int(done) % self._steps

    def on_train_batch_begin(self, batch, logs=None):
        self._watch.tick()
        # Within a virtual batch no worker waits for others, but perhaps for its input.
        steps = self.model.steps_per_execution
        if self.params.get("steps"):
            steps = min(steps, self.params["steps"] - batch)
        self._micro_step += steps
        self._watch.place = A_STEP if self._micro_step >= self._steps else ""
        self._micro_step %= self._steps

    def on_train_batch_end(self, batch, logs=None):
        self._watch.place = ""

    def on_test_begin(self, logs=None):
        # Without a known length of the data Keras begins a step after the last, and never ends it.
        if self._watch is not None:  # `evaluate` begins a test too
            self._watch.place = ""

    def on_epoch_end(self, epoch, logs=None):
        self._watch.place = ""

    def on_train_end(self, logs=None):
        with entering("for the next epoch"):
            _compare({"next epoch": "none, it has stopped"})
        self._close()

    def _close(self):
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch = None


def _compare(values):
    """Raises a ValueError on all workers if they differ in a value, `None` being none."""
    for what, others in zip(values, zip(*hvd.allgather_object(list(values.values())))):
        if len(set(others) - {None}) > 1:
            each = ", ".join(f"worker {rank}: {value}" for rank, value in enumerate(others))
            raise ValueError(
                f"The workers differ in their {what} ({each}): some would wait for the others for "
                "ever. Give all the same, and stop all together."
            )


class AverageMovingStatistics(keras.callbacks.Callback):
    """Averages batch norm's moving statistics before each evaluation and at the end of an epoch.

    Put it before callbacks that save the model.
    """

    def on_test_begin(self, logs=None):
        with entering("before a test"):
            average_moving_statistics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        with entering("at the end of an epoch"):
            average_moving_statistics(self.model)


class SumMetrics(keras.callbacks.Callback):
    """Makes the logs of `fit` those of all workers' examples together; see `sum_metrics`.

    Put it before callbacks that read the logs.
    """

    def on_epoch_begin(self, epoch, logs=None):
        self._training, self._evaluation = None, {}

    def on_test_begin(self, logs=None):
        # Evaluation resets the metrics before the end of the epoch is told.
        with entering("before a test"):
            self._training = sum_metrics(self.model)

    def on_test_end(self, logs=None):
        with entering("after a test"):
            self._evaluation = sum_metrics(self.model)

    def on_epoch_end(self, epoch, logs=None):
        with entering("at the end of an epoch"):
            results = dict(self._training or sum_metrics(self.model))
        results.update({f"val_{name}": value for name, value in self._evaluation.items()})
        if logs is not None:
            logs.update({name: results[name] for name in results if name in logs})


class CheckIdentical(keras.callbacks.Callback):
    """Compares weights and optimizer state of all workers after the first update and each epoch.

    Raises:
        RuntimeError: on every worker, naming the first variable that differs.
    """

    def on_train_begin(self, logs=None):
        self._start = self._updates()
        self._checked = False

    def on_train_batch_end(self, batch, logs=None):
        if not self._checked and self._updates() > self._start:
            self._checked = True
            self._check()

    def on_epoch_end(self, epoch, logs=None):
        self._check()

    def _updates(self):
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _check(self):
        optimizer = self.model.optimizer
        own = _of_one_worker(optimizer)
        state = [v for v in optimizer.variables if id(v) not in own]
        check_identical([*self.model.trainable_variables, *state])


def _with_inner(optimizer):
    return [optimizer, *inner_optimizers(optimizer)]


def _of_one_worker(optimizer):
    """The identities of variables of which in a virtual batch each worker has its own."""
    own = set()
    for holder in _with_inner(optimizer):
        own |= {id(v) for v in getattr(holder, "_accumulated_gradients", ())}
        own |= {id(getattr(holder, name, None)) for name in ("observed_loss", "update_loss")}
    return own


def _refuse_shards(all_steps):
    """What a sharded optimizer has on a worker cannot be made up for by another."""
    each = ", ".join(f"worker {rank}: {max(steps)}" for rank, steps in enumerate(all_steps))
    raise ValueError(
        f"The workers' shards of the optimizer are after unequal numbers of steps ({each}). Load "
        "the saved state on every worker, or use `hvd.scatter_optimizer`."
    )
