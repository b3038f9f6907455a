"""Puts the optimizer's diagnostics into Keras' logs."""

import keras

from nlcg_tf.configurable import check_choice

SHOWN = ("beta", "step_size", "learning_rate_scale", "cosine", "skipped_updates")


class OptimizerDiagnostics(keras.callbacks.Callback):
    """Adds beta, step size, learning-rate scale, cosine and skipped updates to the logs of `fit`.

    The progress bar shows them by itself; callbacks that write the logs, such as `CSVLogger` and
    `TensorBoard`, must come after this one in the list.

    Args:
        update_freq: `"epoch"`, or `"batch"` to read them after each batch too, which makes the
            host wait for the device each time.

    Raises:
        ValueError: for another `update_freq`; when training begins, if the model's optimizer has
            no `diagnostics`.
    """

    def __init__(self, update_freq: str = "epoch") -> None:
        super().__init__()
        check_choice("update_freq", update_freq, ["epoch", "batch"])
        self.update_freq = update_freq

    def on_train_begin(self, logs=None):
        if not hasattr(self._optimizer(), "diagnostics"):
            raise ValueError(
                "OptimizerDiagnostics needs an optimizer with `diagnostics()`, such as nlcg_tf.NLCG"
                f". Received: model.optimizer={self.model.optimizer!r}"
            )

    def on_train_batch_end(self, batch, logs=None):
        if self.update_freq == "batch":
            self._add(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._add(logs)

    def _add(self, logs):
        if logs is not None:
            values = self._optimizer().diagnostics()
            logs.update({name: values[name] for name in SHOWN})

    def _optimizer(self):
        # On JAX asking for `self.model` is what brings the variables up to date during an epoch.
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)  # mixed_float16 wraps it
