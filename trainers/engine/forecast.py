"""What a run would do and need, in words."""

import math

import keras
from absl import flags

from trainers.flags import optimizer

FLAGS = flags.FLAGS


def heading(task, model, plan, done=0):
    """Two lines: the model with its data, and how a batch is divided."""
    return [
        f"{task.name}: {parameters(model):,} parameters, {task.examples:,} training images",
        f"{FLAGS.optimizer}: batch {plan.global_batch_size:,} = {plan.workers} worker(s) x "
        f"{plan.micro_steps} micro-step(s) x {plan.per_worker_batch_size:,}; "
        f"{plan.updates:,} updates in {plan.epochs} epochs, {done} done",
    ]


def forecast(task, plan):
    """`heading`, the learning rate over the run and the memory of a worker, as lines of text."""
    model, schedule = task.model(), task.schedule(plan)
    lines = heading(task, model, plan)
    lines.append(
        f"an epoch: {plan.updates_per_epoch:,} updates, "
        f"{plan.updates_per_epoch * plan.micro_steps:,} micro-steps on each worker"
    )
    epochs = {0.0, schedule.warmup_epochs, *(plan.epochs * i / 10 for i in range(1, 10))}
    rate = lambda epoch: float(schedule(epoch * plan.updates_per_epoch))  # noqa: E731
    last = (plan.updates - 1) / plan.updates_per_epoch
    lines.append(
        f"learning rate at the start of an epoch: warm-up to {schedule.peak:.4g} takes "
        f"{schedule.warmup_epochs:.3g} epochs; "
        + ", ".join(f"{epoch:.3g}: {rate(epoch):.4g}" for epoch in sorted(epochs))
        + f"; last update: {rate(last):.4g}"
    )
    # Besides weights, gradients, their sums and the moving average.
    kept = slots(optimizer(schedule, task.default_line_search))
    if FLAGS.shard_optimizer:
        kept = (kept + 1) / plan.workers  # with the part's weights
    vectors = 4 + kept
    state = 4 * vectors * parameters(model)
    images = plan.per_worker_batch_size * activation_bytes(model)
    lines.append(
        f"memory of a worker: {state / 2**30:.2f} GiB for {vectors:.3g} vectors of the parameters' "
        "size (weights, gradients, their sums, moving average, optimizer), about "
        f"{images / 2**30:.2f} GiB for the layers' outputs of a micro-batch, besides TensorFlow's "
        "work space"
    )
    return lines


def slots(made):
    """How many vectors of the parameters' size an optimizer keeps."""
    size = 1000
    made.build([keras.Variable([0.0] * size)])
    return sum(math.prod(v.shape) for v in made.variables) // size


def parameters(model):
    return sum(math.prod(v.shape) for v in model.trainable_variables)


def activation_bytes(model):
    """Bytes of the outputs of all layers for one image, which the backward pass reads."""
    sizes = {"float32": 4, "bfloat16": 2, "float16": 2}
    outputs = [layer.output for layer in model.layers]
    return sum(math.prod(x.shape[1:]) * sizes[str(x.dtype)] for x in outputs)
