"""How the study trains: Keras optimizers in a graph of many updates, and L-BFGS."""

import functools
import itertools
import math
import time

import keras
import numpy as np
import tensorflow as tf
from scipy.optimize import minimize

from scripts.curvature.ablation import ABLATION, changed, make_optimizer
from scripts.curvature.statistics import POINTS, SEARCH_SEEDS


def make_training(problem, optimizer, updates):
    """The training of a `Problem` by an optimizer's name, with a budget of updates."""
    if optimizer == "lbfgs":
        return LBFGSTraining(problem, updates)
    with changed(optimizer):
        # The reference update is many small operations: XLA makes them 2 to 4 times as fast, but
        # convolutions on a CPU slower.
        xla = optimizer in ABLATION and not problem.convolutions
        return KerasTraining(problem, updates, make_optimizer(optimizer), xla)


class Training:
    """A problem, and what all of its runs share."""

    def __init__(self, problem, updates):
        self.problem, self.updates = problem, updates
        self.model = problem.make_model()
        self.weights = self.model.trainable_variables
        self.data = [tf.constant(array) for array in problem.data]
        self.initial_weights = functools.cache(self.initial_weights)

    def initial_weights(self, seed):
        keras.utils.set_random_seed(seed)
        return self.problem.make_model().get_weights()

    def loss(self, indices=None):
        data = self.data if indices is None else [tf.gather(array, indices) for array in self.data]
        return self.problem.loss(self.model, *data)

    def diagnostics(self):
        """What NLCG says of its last update and its counts; other optimizers say nothing."""
        return {}


class KerasTraining(Training):
    """Training by a Keras optimizer: many updates in one graph, which is traced once."""

    def __init__(self, problem, updates, optimizer, xla=False):
        super().__init__(problem, updates)
        self.optimizer = optimizer
        optimizer.build(self.weights)
        self.initial_state = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
        self.order = tf.Variable(self.epochs(SEARCH_SEEDS[0]))
        self.train = tf.function(self.train, autograph=False, jit_compile=xla)
        self.evaluate = tf.function(self.loss, autograph=False)
        self.train(tf.constant(0), tf.constant(1))
        self.evaluate()

    def diagnostics(self):
        if not hasattr(self.optimizer, "diagnostics"):
            return {}
        figures = self.optimizer.diagnostics()
        if "hessian_diagonal" in self.optimizer.slots:
            h = [np.ravel(slot.numpy()) for slot in self.optimizer.slots["hessian_diagonal"]]
            figures["median_h"] = float(np.median(np.concatenate(h)))
        return figures

    def epochs(self, seed):
        """The examples of each update: permutations of all, one after another."""
        if self.problem.batch is None:
            return np.zeros((self.updates, 0), np.int32)
        rng, examples = np.random.default_rng(seed), len(self.data[0])
        count = self.updates * self.problem.batch
        epochs = [rng.permutation(examples) for _ in range(math.ceil(count / examples))]
        return np.concatenate(epochs)[:count].reshape(self.updates, -1).astype(np.int32)

    def train(self, first, last):
        """Does the updates from `first` to before `last`."""

        def update(i):
            with tf.GradientTape() as tape:
                loss = self.loss(None if self.problem.batch is None else self.order[i])
                loss = self.optimizer.scale_loss(loss)  # tells it the loss
            self.optimizer.apply(tape.gradient(loss, self.weights), self.weights)
            return i + 1

        return tf.while_loop(lambda i: i < last, update, [first], parallel_iterations=1)

    def run(self, rate, seed):
        """One training from the start.

        Returns:
            The curve, a list of (updates, seconds, loss), which ends where the loss is not finite.
        """
        for variable, value in zip(self.weights, self.initial_weights(seed)):
            variable.assign(value)
        for variable, value in zip(self.optimizer.variables, self.initial_state):
            variable.assign(value)
        self.optimizer.learning_rate = rate
        self.order.assign(self.epochs(seed))
        seconds, curve = 0.0, [(0, 0.0, float(self.evaluate()))]
        marks = [round(self.updates * i / POINTS) for i in range(POINTS + 1)]
        for first, last in itertools.pairwise(marks):
            began = time.perf_counter()
            self.train(tf.constant(first), tf.constant(last))
            seconds += time.perf_counter() - began
            curve.append((last, seconds, float(self.evaluate())))
            if not math.isfinite(curve[-1][2]):
                break
        return curve


class LBFGSTraining(Training):
    """Training by SciPy's L-BFGS-B without bounds: a float64 vector outside, a float32 model."""

    def __init__(self, problem, updates):
        super().__init__(problem, updates)
        self.gradient = tf.function(self.gradient, autograph=False)
        self.gradient(tf.constant(self.flat(self.weights), tf.float32))

    def gradient(self, x):
        self.assign(x)
        with tf.GradientTape() as tape:
            loss = self.loss()
        return loss, self.flat(tape.gradient(loss, self.weights))

    def flat(self, tensors):
        return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)

    def assign(self, x):
        parts = tf.split(x, [math.prod(v.shape) for v in self.weights])
        for variable, part in zip(self.weights, parts):
            variable.assign(tf.reshape(part, variable.shape))

    def run(self, rate, seed):
        """As `KerasTraining.run`; a point of the curve is an accepted iterate.

        Where float32 gradients mislead the line search, it begins anew from the last iterate, with
        nothing remembered. The curve ends early where that finds no lower loss either.
        """
        del rate
        start = np.concatenate([w.ravel() for w in self.initial_weights(seed)]).astype(np.float64)
        evaluations, curve, accepted = 0, [], start

        def value_and_gradient(x):
            nonlocal evaluations
            evaluations += 1
            loss, gradient = self.gradient(tf.constant(x, tf.float32))
            if not curve:  # that of the initial weights
                curve.append((0, 0.0, float(loss)))
            return float(loss), gradient.numpy().astype(np.float64)

        def note(intermediate_result):
            nonlocal accepted
            if evaluations <= self.updates:
                curve.append((evaluations, time.perf_counter() - began, intermediate_result.fun))
                accepted = intermediate_result.x.copy()

        began, points = time.perf_counter(), -1
        while len(curve) > points and evaluations < self.updates:
            points = len(curve)
            left = self.updates - evaluations
            minimize(
                value_and_gradient,
                accepted,
                jac=True,
                method="L-BFGS-B",
                callback=note,
                options={"maxcor": 20, "ftol": 0, "gtol": 0, "maxfun": left, "maxiter": left},
            )
        self.assign(tf.constant(accepted, tf.float32))
        kept = np.unique(np.linspace(0, len(curve) - 1, POINTS + 1).round().astype(int))
        return [curve[i] for i in kept]
