from typing import Any


def check_integer(owner: str, name: str, value: Any, minimum: int) -> None:
    """Raises a ValueError unless an argument is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: expected {name} to be an integer >= {minimum}, got {value!r}.")
