"""Makes a virtual batch behave as a real one under Keras' `gradient_accumulation_steps`."""

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule


class CountsUpdates:
    """Mixin for a Keras optimizer: schedules and EMA advance once an update.

    Keras 3 hands the count of micro-steps to a learning-rate schedule, and averages and overwrites
    the weights (`use_ema`) on each micro-step. Without accumulation this mixin changes nothing.
    """

    def _get_current_learning_rate(self):
        if isinstance(self._learning_rate, LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _micro_step(self):
        """The position of this micro-step in its virtual batch, from 0: an integer tensor."""
        return self._iterations % (self.gradient_accumulation_steps or 1)

    def _update_flags(self):
        """(whether this micro-step changed the weights, whether no earlier one did)."""
        steps = self.gradient_accumulation_steps or 1
        return self._micro_step() == steps - 1, self.iterations == 0

    def _update_model_variables_moving_average(self, trainable_variables):
        if not self.use_ema:
            return
        is_update, is_first = self._update_flags()
        for variable, average in zip(trainable_variables, self._model_variables_moving_average):
            if average is None:
                continue
            # Until the first update the average is that of the weights as they are.
            momentum = ops.cast(ops.where(is_first, 0.0, self.ema_momentum), variable.dtype)
            # Inside `fit` on JAX a Variable has no value but the one that this looks up.
            old, new = ops.convert_to_tensor(average), ops.convert_to_tensor(variable)
            new = momentum * old + (1 - momentum) * new
            average.assign(ops.where(is_update | is_first, new, old))

    def _backend_apply_gradients(self, grads, trainable_variables):
        if keras.backend.backend() != "jax" or not self.ema_overwrite_frequency:
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        # Keras' optimizer for JAX overwrites by the count alone, on each micro-step of an update.
        before = [ops.convert_to_tensor(v) for v in self._trainable_variables]
        super()._backend_apply_gradients(grads, trainable_variables)
        is_update, _ = self._update_flags()
        for variable, value in zip(self._trainable_variables, before):
            variable.assign(ops.where(is_update, ops.convert_to_tensor(variable), value))

    def _overwrite_model_variables_with_average_value(self, trainable_variables):
        # Only the training step comes here; `finalize_variable_values` goes past.
        is_update, _ = self._update_flags()
        overwrite = super()._overwrite_model_variables_with_average_value
        ops.cond(is_update, lambda: overwrite(trainable_variables), lambda: None)

    def finalize_variable_values(self, var_list):
        if self.use_ema:
            # Loss scaling may have skipped all updates, and left the average at zero.
            if self.built and int(ops.convert_to_numpy(self._iterations)) > 0:
                super()._overwrite_model_variables_with_average_value(var_list)
        elif self.built:
            super().finalize_variable_values(var_list)  # a wrapper hands it on
