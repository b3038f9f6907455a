"""A saved optimizer says which settings its state belongs to."""

import json
from typing import Any

import keras
import numpy as np

# What decides which variables there are before the first update.
WITHOUT_SLOTS = ("gradient_accumulation_steps", "uses_loss", "learning_rate")


class KnowsItsLayout(keras.optimizers.Optimizer):
    """Mixin of `NLCG`, whose settings it reads: a state of others is refused by name.

    Keras restores by position, and only warns where the numbers of variables differ.
    """

    def save_own_variables(self, store: Any) -> None:
        """Stores the variables, and which settings they belong to."""
        super().save_own_variables(store)
        store["layout"] = np.frombuffer(json.dumps(self._layout()).encode(), np.uint8)

    def _layout(self):
        """The settings that decide which variables there are and what they mean."""
        names = {
            name: type(getattr(self, name)).__name__ for name in ("preconditioner", "line_search")
        }
        is_number = isinstance(self._learning_rate, keras.Variable)
        return {
            **names,
            "slots": [*self.slots] if self.built else [],
            "nesterov": self.nesterov,
            "lars_coefficient": self.lars_coefficient is not None,
            "use_ema": self.use_ema,
            "gradient_accumulation_steps": bool(self.gradient_accumulation_steps),
            "uses_loss": self._uses_loss,
            "learning_rate": "a number" if is_number else "a schedule or function",
        }

    def load_own_variables(self, store: Any) -> None:
        """Restores the optimizer from a saved model.

        A state saved before the first update makes this optimizer start anew. An optimizer without
        slots yet, or a file without optimizer state, is what Keras makes of it: a warning, and the
        weights alone are loaded.

        Raises:
            ValueError: if the saved state is of other settings or shapes, where Keras would only
                warn, take one variable for another, or load a part. Nothing is loaded then.
        """
        saved = {name: store[name] for name in store.keys() if name != "layout"}
        if len(saved) == self._count_without_slots:
            # Saved before the first update: there are no slots to restore.
            self._check_layout(store, WITHOUT_SLOTS)
            self._start_anew()
            for i, variable in enumerate(self.variables[: self._count_without_slots]):
                variable.assign(saved[str(i)])
            return
        if self.built and saved:
            self._check_layout(store, self._layout())
        super().load_own_variables(saved)

    def _check_layout(self, store, names):
        if "layout" not in store.keys():
            raise ValueError(
                f"The saved state of optimizer '{self.name}' does not say which settings it "
                "belongs to: it is another optimizer's, of an older version of nlcg_tf, or a list "
                "of variables. To load the weights of a model without it, use "
                "`load_weights(..., skip_mismatch=True)`."
            )
        layout, own = json.loads(np.asarray(store["layout"]).tobytes()), self._layout()
        other = [
            f"{name}: saved {layout[name]!r}, wanted {own[name]!r}"
            for name in names
            if name in layout and layout[name] != own[name]  # an older version had fewer
        ]
        saved = {name: tuple(store[name].shape) for name in store.keys() if name != "layout"}
        if "slots" in names and len(saved) != len(self.variables):
            other.append(f"variables: saved {len(saved)}, wanted {len(self.variables)}")
        if not other:
            other = [
                f"shape of '{v.path}': saved {saved.get(str(i))}, wanted {tuple(v.shape)}"
                for i, v in enumerate(self.variables[: len(saved)])
                if saved.get(str(i)) != tuple(v.shape)
            ]
        if other:
            raise ValueError(
                f"The saved state of optimizer '{self.name}' is of other settings: "
                + "; ".join(other)
            )
