from typing import Any


def check_integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Raises a ValueError unless an argument is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: expected {name} to be an integer >= {minimum}, got {value!r}.")


def check_real(owner: str, name: str, value: Any, low: float, high: float) -> None:
    """Raises a ValueError unless an argument is a number in ``[low, high]``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        raise ValueError(
            f"{owner}: expected {name} to be a number in [{low:g}, {high:g}], got {value!r}."
        )
