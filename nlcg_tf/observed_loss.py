"""How an optimizer sees the loss, in `fit` and in loops of a user's own."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from nlcg_tf.loss_scaling import tell_inner_optimizers

if keras.backend.backend() == "tensorflow":
    from nlcg_tf import replicas

# In `observed_loss` where none was observed since the last `apply`. As a loss it is not finite: an
# update with it is skipped.
NO_LOSS = -np.inf


class ObservesLoss(keras.optimizers.Optimizer):
    """Mixin of `NLCG`, which has `_add_state`: each update has its loss in `update_loss`."""

    def _watch_loss(self, uses_loss):
        """To be called in `__init__`; `uses_loss`: whether updates need a loss."""
        self._uses_loss = uses_loss
        if uses_loss:
            tell_inner_optimizers()
            # A custom loop may observe a loss before the first update builds the slots.
            self.observed_loss = self._add_state("observed_loss", NO_LOSS, keras.config.floatx())
            self.update_loss = self.observed_loss
            if self.gradient_accumulation_steps:
                # The mean over the micro-steps whose gradients were applied.
                self.update_loss = self._add_state("update_loss", 0.0, keras.config.floatx())
        self._pending_loss = None
        self._loss_is_known = self._loss_comes_from_graph = False

    def observe_loss(self, loss: Any) -> None:
        """Tells the optimizer the loss of the coming update.

        For custom training loops, before `apply` or `apply_gradients`; `fit` does it by itself.
        Under `gradient_accumulation_steps` call it on each micro-batch: the losses are averaged.
        Under a `tf.distribute` strategy call it in the replica context, with the loss already
        divided by the number of replicas, as its gradient must be.

        Args:
            loss: scalar tensor or float. With several Horovod workers, this worker's own mean.

        Raises:
            ValueError: if `loss` is not a scalar.
        """
        if not self._uses_loss:
            return
        try:
            # A Python number may be too large for its type: it is infinite then.
            loss = np.float64(loss) if isinstance(loss, (int, float)) else loss
            loss = ops.stop_gradient(ops.cast(loss, self.observed_loss.dtype))
        except Exception as error:  # each backend has its own
            raise ValueError(
                f"`loss` must be a scalar number. Received: loss={loss!r} ({error})"
            ) from error
        if len(loss.shape) != 0:
            raise ValueError(f"`loss` must be a scalar. Received: shape={tuple(loss.shape)}")
        if keras.backend.backend() == "tensorflow":
            self.observed_loss.assign(replicas.sum_over_replicas([loss])[0])
            # What is traced once runs many times: from then on a graph brings the losses.
            self._loss_comes_from_graph |= replicas.is_tracing()
        else:
            # A stateless training step keeps no assignment made outside `stateless_apply`.
            self._pending_loss = loss
        self._loss_is_known = True

    def scale_loss(self, loss: Any) -> Any:
        """Keras' hook before the gradients are computed: here the optimizer sees the loss."""
        self.observe_loss(loss)
        return super().scale_loss(loss)

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Does one update; see `keras.optimizers.Optimizer.apply`.

        Raises:
            ValueError: if no loss was observed since the last call, and the line search or
                the update rule needs one. (In a graph that was traced before, such an update is
                skipped.)
        """
        if not self._uses_loss:
            super().apply(grads, trainable_variables)
            return
        self._check_loss()
        if self._pending_loss is not None:
            loss, self._pending_loss = self._pending_loss, None
            self.observed_loss.assign(loss)
        if self.update_loss is not self.observed_loss:
            # Here, not where it is observed: loss scaling may drop a micro-step in between.
            position = ops.cast(self._micro_step(), self.update_loss.dtype)
            loss = ops.convert_to_tensor(self.observed_loss)
            mean = self.update_loss + (loss - self.update_loss) / (position + 1)
            self.update_loss.assign(ops.where(position == 0, loss, mean))
        super().apply(grads, trainable_variables)
        self.observed_loss.assign(ops.full((), NO_LOSS, self.observed_loss.dtype))

    def _check_loss(self):
        known, on_tensorflow = self._loss_is_known, keras.backend.backend() == "tensorflow"
        # A trace that builds the optimizer is made a second time.
        is_repeated = on_tensorflow and not self.built and replicas.is_tracing()
        self._loss_is_known = known and is_repeated
        if not known and self._loss_comes_from_graph:
            # A call of the graph leaves nothing in Python.
            known = replicas.is_tracing() or self.observed_loss.numpy() != NO_LOSS
        if not known:
            raise ValueError(
                "NLCG has not seen the loss of this update. Call `optimizer.observe_loss(loss)` "
                "before the gradients are applied, or `scale_loss` in a `train_step` of your own. "
                "Without a loss work `line_search=None` and `update_rule='momentum'`, "
                "'fletcher_reeves' or 'polak_ribiere'. "
                f"Received: update_rule={self.update_rule!r}, line_search={self.line_search!r}"
            )
