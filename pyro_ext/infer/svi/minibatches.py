"""The data of a training run: a number of steps, or an iterable of minibatches."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pyro_ext._random_states import generators_of

Data = int | Iterable[Any]


def minibatches(data: Data) -> Iterator[Any]:
    """Iterate over the minibatches of an epoch."""
    return itertools.repeat((), data) if isinstance(data, int) else iter(data)


def length_of(data: Any) -> int | None:
    """Return the number of minibatches of an epoch, or None if the data does not say it."""
    if isinstance(data, int):
        return data
    try:
        return len(data)
    except TypeError:
        return None


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments that a minibatch stands for."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    return (batch,), {}


def loader_settings(data: Data) -> dict[str, Any]:
    """Return the settings of the data that a resumed run must have as well."""
    return {"loader.length": length_of(data), "loader.generators": len(generators_of(data))}
