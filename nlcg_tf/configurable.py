"""Small objects that an optimizer takes as an argument: found by name, checked, saved with it."""

import dataclasses
import math
import numbers

import keras


class Configurable:
    """A dataclass whose fields are its configuration."""

    def get_config(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def _check(self, name, valid, condition):
        value = getattr(self, name)
        if not valid(value):
            raise ValueError(f"`{name}` must {condition}. Received: {name}={value!r}")


def is_number(value):
    return isinstance(value, numbers.Real) and type(value) is not bool and math.isfinite(value)


def is_fraction(value):
    return is_number(value) and 0 < value <= 1


def resolve(argument, identifier, classes, methods):
    """The object that an argument names.

    Args:
        argument: string, the argument's name for the error message.
        identifier: a key of `classes`, `None`, a serialised object, or an object with `methods`.
        classes: dict from names to classes.
        methods: names of the methods that an object must have.

    Raises:
        ValueError: for anything else.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str) and identifier in classes:
        return classes[identifier]()
    if isinstance(identifier, dict) and "class_name" in identifier:
        identifier = keras.saving.deserialize_keras_object(identifier)
    if not isinstance(identifier, (str, type)) and all(
        callable(getattr(identifier, name, None)) for name in methods
    ):
        return identifier
    names = ", ".join(repr(name) for name in classes)
    raise ValueError(
        f"`{argument}` must be {names}, None or an object with the methods {', '.join(methods)}. "
        f"Received: {argument}={identifier!r}"
    )
