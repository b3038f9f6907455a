"""How a global batch is divided among workers and micro-steps."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """W workers times k micro-steps times b examples make one update.

    Attributes:
        global_batch_size: examples of one update, W k b.
        per_worker_batch_size: examples of one micro-step on one worker, b.
        workers: number of workers, W.
        micro_steps: micro-steps of one update, k.
        updates_per_epoch: updates in one epoch.
        epochs: number of epochs.
    """

    global_batch_size: int
    per_worker_batch_size: int
    workers: int
    micro_steps: int
    updates_per_epoch: int
    epochs: int

    @property
    def updates(self):
        return self.epochs * self.updates_per_epoch


def divide(global_batch_size, per_worker_batch_size, workers):
    """The largest per-worker batch, at most the given one, that divides a global batch.

    For elastic jobs, whose number of workers changes while the global batch must not.

    Raises:
        ValueError: if the global batch has no equal parts for so many workers.
    """
    if global_batch_size % workers:
        raise ValueError(
            f"--global_batch_size={global_batch_size} cannot be divided among {workers} worker(s): "
            "choose one that is a multiple of every number of workers that you allow"
        )
    part = global_batch_size // workers
    return max(b for b in range(1, min(part, per_worker_batch_size) + 1) if part % b == 0)


def make_plan(examples, global_batch_size, per_worker_batch_size, workers, epochs):
    """Divides a global batch.

    Args:
        examples: training examples in an epoch; the last, incomplete batch is left out.
        global_batch_size: int; may exceed `examples`: then an epoch is one update.
        per_worker_batch_size: int.
        workers: int.
        epochs: int.

    Raises:
        ValueError: if workers times per-worker batch do not divide the global batch.
    """
    step = workers * per_worker_batch_size
    if global_batch_size % step:
        raise ValueError(
            f"--global_batch_size={global_batch_size} is not a multiple of {workers} worker(s) x "
            f"--per_worker_batch_size={per_worker_batch_size} = {step}"
        )
    return BatchPlan(
        global_batch_size=global_batch_size,
        per_worker_batch_size=per_worker_batch_size,
        workers=workers,
        micro_steps=global_batch_size // step,
        updates_per_epoch=max(1, examples // global_batch_size),
        epochs=epochs,
    )
