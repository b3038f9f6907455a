"""The trainers' training on one device through JAX: a compiled scan an epoch, data on the device.

Model, schedule, weight decay and optimizers are those of `trainers`, the order of the examples too;
only the random numbers of the augmentation are JAX's own, drawn by (seed, epoch, index). On a CPU
Python does the loops: XLA's convolutions take tens of times as long in a compiled one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import keras
import numpy as np

from nlcg_tf.schedules import CifarSchedule
from trainers.data.order import epoch_indices
from trainers.engine import averages
from trainers.engine.plan import make_plan
from trainers.models.cifar_resnet import cifar_resnet
from trainers.optimizers.choice import OPTIMIZERS, cifar_line_search, from_flags, make_schedule

TEST_BATCH_SIZE = 500


class Training:
    """Runs that differ in their seeds alone, side by side where there are several.

    Args:
        flags: dict of values of the trainers' flags.
        seeds: list of ints.
        data: an `ImageFiles`.
        augment: whether training images are cropped and mirrored at random.
    """

    def __init__(self, flags, seeds, data, augment=True):
        self.flags, self.seeds, self.data, self.augment = flags, seeds, data, augment
        images, labels = (part[: flags["training_examples"]] for part in data.train)
        batch = flags["global_batch_size"]
        per_step = min(batch, flags["per_worker_batch_size"] or batch)
        self.plan = make_plan(len(labels), batch, per_step, 1, flags["epochs"])
        decays = OPTIMIZERS[flags["optimizer"]].decays
        depth, shape = flags["depth"], images.shape[1:]
        self.models = []
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            decay = 0.0 if decays else flags["weight_decay"]
            self.models.append(cifar_resnet(depth, shape, data.classes, decay))
        self.model = self.models[0]
        self.schedule = make_schedule(CifarSchedule, flags, self.plan)
        self.optimizer = from_flags(flags, self.schedule, cifar_line_search(batch))
        self.optimizer.build(self.model.trainable_variables)
        # Arguments of what is compiled: as constants they would lie in each program.
        self.train = jnp.asarray(images), jnp.asarray(labels)
        self.test = tuple(map(jnp.asarray, data.test))
        self.compile(loops_in_python=jax.default_backend() == "cpu")

    def compile(self, loops_in_python):
        """Chooses who does the loops, and so what is compiled: their bodies, or the whole."""

        def as_it_is(step):
            return step

        def across(step, *axes):
            return jax.vmap(step, axes) if len(self.seeds) > 1 else step

        body, whole = (jax.jit, as_it_is) if loops_in_python else (as_it_is, jax.jit)
        self._scan = _loop if loops_in_python else jax.lax.scan
        self._add = body(across(self._add_gradient, None, 0, 0, 0, 0))
        self._finish = body(across(self._finish_update, 0, 0))
        self._test = body(across(self._test_batch, None, 0, 0))
        self._epoch, self._evaluation = whole(self._train_epoch), whole(self._evaluate)

    def initial_state(self):
        """The state of all runs before the first update: a dict of lists of arrays."""
        states = []
        for model in self.models:
            weights = [jnp.asarray(v.value) for v in model.trainable_variables]
            states.append(
                {
                    "weights": weights,
                    "statistics": [jnp.asarray(v.value) for v in model.non_trainable_variables],
                    "optimizer": [jnp.asarray(v.value) for v in self.optimizer.variables],
                    "averages": weights,
                    "updates": jnp.zeros((), jnp.int32),
                }
            )
        if len(states) == 1:
            return states[0]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *states)

    def train_epoch(self, state, epoch):
        """Trains all runs for an epoch.

        Returns:
            `(state, log)`: the log a list with a dict of arrays for each run: "loss" and
            "learning_rate" of each update, "reals" and "counts" of NLCG, and the sums of losses and
            of correct answers, "sums".
        """
        plan, alone = self.plan, len(self.seeds) == 1
        count = plan.updates_per_epoch * plan.global_batch_size
        shape = (plan.updates_per_epoch, plan.micro_steps, 1, -1)
        orders = [epoch_indices(len(self.train[1]), count, seed, epoch) for seed in self.seeds]
        order = np.concatenate([indices.reshape(shape) for indices in orders], axis=2)
        examples = order, np.broadcast_to(np.arange(count).reshape(shape), order.shape)
        keys = [jax.random.fold_in(jax.random.key(seed), epoch) for seed in self.seeds]
        if alone:
            examples = [x[:, :, 0] for x in examples]
        key = keys[0] if alone else jnp.stack(keys)
        state, log = self._epoch(self.train, state, key, tuple(map(jnp.asarray, examples)))
        log = jax.device_get(log)
        if alone:
            return state, [log]
        return state, [jax.tree.map(lambda x, i=i: x[:, i], log) for i in range(len(self.seeds))]

    def evaluate(self, state):
        """Loss and accuracies on the test images, also of the averaged weights, of each run."""
        figures = np.asarray(self._evaluation(self.test, state)).reshape(len(self.seeds), 2, 3)
        names = ("test_loss", "top1", "top5"), (None, "averaged_top1", "averaged_top5")
        return [
            {
                name: float(value)
                for row, kinds in zip(run, names)
                for name, value in zip(kinds, row)
                if name
            }
            for run in figures
        ]

    def _train_epoch(self, train, state, key, examples):
        return self._scan(functools.partial(self._update, train, key), state, examples)

    def _update(self, train, key, state, examples):
        """One update over all micro-batches of a virtual batch."""
        sums = {
            "statistics": state["statistics"],
            "gradients": jax.tree.map(jnp.zeros_like, state["weights"]),
        }
        zeros = jnp.zeros(state["updates"].shape)
        sums.update(loss=zeros, entire_loss=zeros, correct=zeros)

        def add(sums, part):
            return self._add(train, key, state["weights"], sums, part), None

        sums, _ = self._scan(add, sums, examples)
        return self._finish(state, sums)

    def _add_gradient(self, train, key, weights, sums, part):
        """Adds a micro-batch to the gradient and loss of the virtual batch."""
        images, labels = self._batch(train, key, *part)
        gradient = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (statistics, hits)), gradients = gradient(
            weights, sums["statistics"], images, labels
        )
        return {
            "statistics": statistics,
            "gradients": [a + b for a, b in zip(sums["gradients"], gradients)],
            "loss": sums["loss"] + loss,
            "entire_loss": sums["entire_loss"] + loss * len(labels),
            "correct": sums["correct"] + hits,
        }

    def _finish_update(self, state, sums):
        """Updates weights and averages with the means over the virtual batch."""
        micro_steps = self.plan.micro_steps
        loss = sums["loss"] / micro_steps
        rate = self.schedule(state["updates"])
        if hasattr(self.optimizer, "observe_loss"):
            self.optimizer.observe_loss(loss)
        weights, optimizer = self.optimizer.stateless_apply(
            state["optimizer"], [g / micro_steps for g in sums["gradients"]], state["weights"]
        )
        decay = averages.decay(state["updates"])
        averaged = [a - (1 - decay) * (a - w) for a, w in zip(state["averages"], weights)]
        log = {"loss": loss, "learning_rate": rate}
        log["sums"] = jnp.stack([sums["entire_loss"], sums["correct"]])
        for name in ("reals", "counts"):
            if hasattr(self.optimizer, name):
                position = _position(self.optimizer.variables, getattr(self.optimizer, name))
                log[name] = optimizer[position]
        state = {
            "weights": weights,
            "statistics": sums["statistics"],
            "optimizer": optimizer,
            "averages": averaged,
            "updates": state["updates"] + 1,
        }
        return state, log

    def _loss(self, weights, statistics, images, labels):
        logits, statistics, losses = self.model.stateless_call(
            weights, statistics, images, training=True, return_losses=True
        )
        entropy = _cross_entropy(logits, labels)
        smoothing = self.flags["label_smoothing"]
        if smoothing:
            even = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
            entropy = entropy + smoothing * (even - entropy)
        hits = jnp.sum(_in_top(logits, labels, 1))
        return jnp.mean(entropy) + sum(losses), (statistics, hits)

    def _batch(self, train, key, indices, places):
        """Images, augmented and standardised, and labels of a micro-batch."""
        images, labels = (part[indices] for part in train)
        if self.augment:
            draws = jax.vmap(lambda place: jax.random.bits(jax.random.fold_in(key, place), (3,)))
            images = self._augment(images, draws(places))
        return _standardise(images), labels

    def _augment(self, images, draws):
        pad, (height, width) = self.data.padding, images.shape[1:3]
        limits = jnp.array([2 * pad + 1, 2 * pad + 1, 2 if self.data.flip else 1], draws.dtype)
        draws = (draws % limits).astype(jnp.int32)
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def crop(image, draw):
            start = (draw[0], draw[1], 0)
            part = jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))
            return jnp.where(draw[2] > 0, part[:, ::-1], part)

        return jax.vmap(crop)(padded, draws)

    def _evaluate(self, test, state):
        """Loss, top-1 and top-5 with the weights, and with their averages: `(..., 2, 3)`."""
        count = len(test[1])
        steps = -(-count // TEST_BATCH_SIZE)
        places = jnp.arange(steps * TEST_BATCH_SIZE).reshape(steps, -1)
        side_by_side = state["updates"].shape
        shape = (steps, *side_by_side, TEST_BATCH_SIZE)
        places = jnp.broadcast_to(places[:, None] if side_by_side else places, shape)

        def step(sums, places):
            return sums + self._test(test, state, places), None

        sums, _ = self._scan(step, jnp.zeros((*side_by_side, 2, 3)), places)
        return sums / count

    def _test_batch(self, test, state, places):
        """The sums over a batch of test images; those past the last count nothing."""
        indices = jnp.minimum(places, len(test[1]) - 1)
        counted = (places < len(test[1])).astype(jnp.float32)
        images, labels = (part[indices] for part in test)
        images = _standardise(images)
        rows = []
        for weights in (state["weights"], state["averages"]):
            logits, _ = self.model.stateless_call(
                weights, state["statistics"], images, training=False
            )
            parts = [_cross_entropy(logits, labels)]
            parts += [_in_top(logits, labels, k) for k in (1, 5)]
            rows.append(jnp.stack([jnp.sum(counted * part) for part in parts]))
        return jnp.stack(rows)


def _loop(step, carry, parts):
    """`jax.lax.scan`, in Python."""
    results = []
    for i in range(len(jax.tree.leaves(parts)[0])):
        carry, result = step(carry, jax.tree.map(lambda x, i=i: x[i], parts))
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def _position(variables, wanted):
    return next(i for i, variable in enumerate(variables) if variable is wanted)


def _cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def _in_top(logits, labels, k):
    """1 where fewer than k logits exceed that of the label, which is how TensorFlow counts."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    return (jnp.sum(logits > own, axis=-1) < k).astype(jnp.float32)


def _standardise(images):
    """Mean 0 and deviation 1 of each image, as `tf.image.per_image_standardization`."""
    images = images.astype(jnp.float32)
    axes, size = (1, 2, 3), math.prod(images.shape[1:])
    mean = jnp.mean(images, axes, keepdims=True)
    deviation = jnp.std(images, axes, keepdims=True)
    return (images - mean) / jnp.maximum(deviation, 1 / math.sqrt(size))
