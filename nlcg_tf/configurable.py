"""Small objects that an optimizer takes as an argument: found by name, checked, saved with it."""

import dataclasses
import math
import numbers

import keras


class Configurable:
    """A dataclass whose fields are its configuration, or a class without any."""

    def get_config(self):
        if type(self).__init__ is object.__init__:
            return {}
        if not dataclasses.is_dataclass(self):
            raise TypeError(
                f"{type(self).__name__} has settings: make it a dataclass, or add `get_config`"
            )
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


def check_choice(name, value, choices):
    """Raises a ValueError for a value that is none of the choices, as 1 for True."""
    if not any(value is choice or (type(value) is str and value == choice) for choice in choices):
        options = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {options}. Received: {name}={value!r}")


def check_number(name, value, least, most):
    """Raises a ValueError for what is no number between two."""
    valid = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # float16 knows no 1e-37, and float no 10^400.
    number = float(value) if valid and not isinstance(value, int) else value
    if not valid or not least <= number <= most:
        raise ValueError(
            f"`{name}` must be a number between {least} and {most}. Received: {name}={value!r}"
        )


def resolve(argument, identifier, classes, base):
    """The object that an argument names.

    Args:
        argument: string, the argument's name for the error message.
        identifier: a key of `classes`, `None`, a serialised object, or an object.
        classes: dict from names to classes.
        base: the class of such objects, or names of the methods that they must have.

    Raises:
        ValueError: for anything else.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str) and identifier in classes:
        return classes[identifier]()
    if isinstance(identifier, dict) and "class_name" in identifier:
        try:
            identifier = keras.saving.deserialize_keras_object(identifier)
        except TypeError as error:
            raise ValueError(
                f"`{argument}` cannot be made. Received: {argument}={identifier!r} ({error})"
            ) from error
    if isinstance(base, type):
        fits, wanted = isinstance(identifier, base), f"a {base.__name__}"
    else:
        wanted = f"an object with the methods {', '.join(base)}"
        fits = not isinstance(identifier, (str, type)) and all(
            callable(getattr(identifier, name, None)) for name in base
        )
    if fits:
        return identifier
    names = ", ".join(repr(name) for name in classes)
    raise ValueError(
        f"`{argument}` must be {names}, None or {wanted}. Received: {argument}={identifier!r}"
    )
