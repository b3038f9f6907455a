"""The learning-rate schedules of the paper's experiments; a step is an update."""

import math
from typing import Any

import keras
from keras import ops

from nlcg_tf.configurable import check_choice, is_number

START = 0.001


class _WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """A ramp from 0.001 to the peak rate, then a decay; `epochs` fixes the length of both."""

    def __init__(
        self,
        batch_size: int,
        epochs: int,
        steps_per_epoch: int,
        factor: float = 1.0,
        peak: float | None = None,
        decay: str = "paper",
    ) -> None:
        super().__init__()
        check_choice("decay", decay, ["paper", "cosine"])
        arguments: dict[str, Any] = {
            "batch_size": batch_size,
            "epochs": epochs,
            "steps_per_epoch": steps_per_epoch,
            "factor": factor,
            "peak": peak,
        }
        for name, value in arguments.items():
            if name == "peak" and value is None:
                continue
            if not is_number(value) or not value > 0:
                raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
        self._config = {**arguments, "decay": decay}
        if peak is not None and factor != 1:
            raise ValueError(
                f"`factor` is on the paper's rate, which `peak` replaces: give one. Received: "
                f"factor={factor!r}, peak={peak!r}"
            )
        papers = factor * 0.1 * batch_size / self.reference_batch_size
        self.peak = papers if peak is None else float(peak)
        self._of_papers = self.peak / papers
        self.warmup_epochs = self._warmup_epochs(batch_size) * min(
            1.0, epochs / self.reference_epochs
        )

    def __call__(self, step: Any) -> Any:
        epoch = ops.cast(step, "float32") / self._config["steps_per_epoch"]
        progress = ops.clip(epoch / self.warmup_epochs, 0.0, 1.0)
        start = min(START, self.peak)
        ramp = start + (self.peak - start) * self._ramp(progress)
        after = self._cosine if self._config["decay"] == "cosine" else self._after
        return ops.where(epoch < self.warmup_epochs, ramp, after(epoch))

    def _cosine(self, epoch):
        """From the peak to 0."""
        length = self._config["epochs"] - self.warmup_epochs
        progress = ops.clip((epoch - self.warmup_epochs) / length, 0.0, 1.0)
        return self.peak * (1 + ops.cos(math.pi * progress)) / 2

    def get_config(self) -> dict[str, Any]:
        return dict(self._config)


@keras.saving.register_keras_serializable(package="nlcg_tf")
class CifarSchedule(_WarmUp):
    """CIFAR-100: peak rate 0.1 * batch_size / 128, square-root warm-up, two drops by ten.

    The warm-up takes 25 epochs, or an eighth of a run of less than 200. The drops come at epochs
    102 and 153 of 200, and at the same fractions of any other number of epochs.

    Args:
        batch_size: int, the global batch of one update.
        epochs: number, length of the whole run.
        steps_per_epoch: number, updates in an epoch.
        factor: number by which the peak rate is multiplied.
        peak: number or `None`, the peak rate itself, in place of the formula above.
        decay: `"paper"`, or `"cosine"` for a cosine from the peak to 0 at the end.

    Raises:
        ValueError: for an argument that is not a positive number, for another decay, or if both
            `factor` and `peak` are given.
    """

    reference_batch_size = 128
    reference_epochs = 200

    def _warmup_epochs(self, batch_size):
        return 25.0

    def _ramp(self, progress):
        return ops.sqrt(progress)

    def _after(self, epoch):
        # Whole updates: a boundary must not move by the rounding of a fraction of an epoch.
        steps_per_epoch, epochs = self._config["steps_per_epoch"], self._config["epochs"]
        step = ops.round(epoch * steps_per_epoch)
        rate = ops.full_like(epoch, self.peak)
        for boundary in (102, 153):
            first_step = round(boundary * epochs / self.reference_epochs * steps_per_epoch)
            rate = ops.where(step >= first_step, 0.1 * rate, rate)
        return rate


@keras.saving.register_keras_serializable(package="nlcg_tf")
class ImageNetSchedule(_WarmUp):
    """ImageNet: peak rate 0.1 * batch_size / 256, linear warm-up, exponential staircase.

    The warm-up takes 5 epochs, 15 above a batch of 8,192, 30 above 32,768, and proportionally less
    in a run of less than 90 epochs. Then the rate falls by the same factor every 2 epochs and
    reaches 0.001 at the end of the run, or 0.01 from a batch of 8,192 on. With a `peak` of its own
    it falls to the same fraction of that.

    Arguments and errors are those of `CifarSchedule`.
    """

    reference_batch_size = 256
    reference_epochs = 90

    def _warmup_epochs(self, batch_size):
        return 30.0 if batch_size > 32768 else 15.0 if batch_size > 8192 else 5.0

    def _ramp(self, progress):
        return progress

    def _after(self, epoch):
        end = 0.001 if self._config["batch_size"] < 8192 else 0.01
        end = min(end * self._of_papers, self.peak)
        stairs = max(1, (self._config["epochs"] - self.warmup_epochs) // 2)
        stair = ops.clip(ops.floor((epoch - self.warmup_epochs) / 2), 0, stairs)
        return self.peak * (end / self.peak) ** (stair / stairs)
