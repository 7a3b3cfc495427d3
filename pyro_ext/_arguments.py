"""Checks of arguments, and descriptions of wrong values for error messages."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def describe(value: Any) -> str:
    """Return a short description of a value for an error message.

    It never contains the entries of a tensor or of a long list.
    """
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    name = type(value).__name__
    vowels = "AEFHILMNORSX" if name.isupper() else "AEIOUaeiou"  # "an SVI", but "a Sequential"
    size = f" of length {len(value)}" if isinstance(value, (list, tuple, dict, set)) else ""
    return f"{'an' if name[0] in vowels else 'a'} {name}{size}"


def abbreviate(values: Iterable[Any], most: int = 5) -> str:
    """Return the first values of a list, and the number of the others, for an error message.

    :param values: names or numbers.
    :param most: the largest number of values to list.
    """
    values = list(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{values[:most]}{more}"


def check_type(
    owner: str, name: str, value: Any, kind: type | tuple[type, ...], expected: str
) -> None:
    """Raise a TypeError unless an argument has a given type.

    :param owner: the name of the function or class that has the argument, for the message.
    :param name: the name of the argument.
    :param value: its value.
    :param kind: the type, or a tuple of types.
    :param expected: a description of the type, such as "a tensor".
    :raises TypeError: if ``value`` is not an instance of ``kind``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{owner}: {name} must be {expected}, but it is {describe(value)}.")


def check_integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Raise an error unless an argument is an integer of at least ``minimum``.

    :raises TypeError: if it is not an integer.
    :raises ValueError: if it is too small.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{owner}: {name} must be an integer >= {minimum}, but it is {describe(value)}."
        )
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, but it is {value}.")


def check_real(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise an error unless an argument is a number in ``[low, high]``.

    :raises TypeError: if it is not a number.
    :raises ValueError: if it is outside the interval.
    """
    _check_number(owner, name, value)
    if not low <= value <= high:
        interval = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{owner}: {name} must be {interval}, but it is {value}.")


def check_nesting(owner: str, value: Any) -> None:
    """Raise an error unless ``max_plate_nesting`` is an integer >= 0 or infinity.

    :raises TypeError: if it is neither an integer nor infinity.
    :raises ValueError: if it is negative.
    """
    if value != math.inf:
        check_integer(owner, "max_plate_nesting", value, 0)


def check_positive(owner: str, name: str, value: Any) -> None:
    """Raise an error unless an argument is a positive and finite number.

    :raises TypeError: if it is not a number.
    :raises ValueError: if it is not positive, or not finite.
    """
    _check_number(owner, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name} must be positive and finite, but it is {value}.")


def _check_number(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, but it is {describe(value)}.")
