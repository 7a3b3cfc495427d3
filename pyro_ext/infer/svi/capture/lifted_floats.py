import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_ext.infer.svi.capture.graph_inputs import Arguments
from pyro_ext.infer.svi.capture.reachable_state import Place

#: The types of floats that become inputs of a graph.
FLOATS = (float, np.float64)


class _Attribute(NamedTuple):
    """An attribute that is a float or a tuple of floats, with a tensor for each float."""

    holder: dict[str, Any]
    key: str
    label: str
    kind: type
    tensors: tuple[Tensor, ...]


class LiftedFloats:
    """Floats that may change between steps, as tensors that a graph reads.

    It lifts floats and tuples of floats among the attributes of an objective (such as an alpha),
    and floats among the arguments.

    :param objectives: the objects whose attributes are lifted, with their names.
    :param is_on: whether to lift any floats.
    """

    def __init__(self, objectives: list[tuple[str, Any]], is_on: bool = True) -> None:
        self.is_on = is_on
        self.attributes = [
            _Attribute(vars(owner), key, f"{name}.{key}", type(value), tuple(map(_tensor, floats)))
            for name, owner in (objectives if is_on else ())
            for key, value in getattr(owner, "__dict__", {}).items()
            if (floats := _floats(value))
        ]

    @property
    def places(self) -> list[Place]:
        """The places of the lifted attributes."""
        return [Place(holder, key, label) for holder, key, label, *_ in self.attributes]

    def lift(self, arguments: Arguments) -> Arguments:
        """Return the arguments with tensors in place of floats."""
        if not self.is_on:
            return arguments
        leaves = [_tensor(leaf) if type(leaf) in FLOATS else leaf for leaf in arguments.leaves]
        return Arguments(leaves, arguments.spec)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the attributes by their tensors, and restore them at the end."""
        self.update()
        before = [attribute.holder[attribute.key] for attribute in self.attributes]
        for holder, key, _, kind, tensors in self.attributes:
            holder[key] = tensors if kind is tuple else tensors[0]
        try:
            yield
        finally:
            for attribute, value in zip(self.attributes, before, strict=True):
                attribute.holder[attribute.key] = value

    def update(self) -> None:
        """Copy the current floats into the tensors."""
        for holder, key, _, kind, tensors in self.attributes:
            values = holder[key] if kind is tuple else (holder[key],)
            for tensor, value in zip(tensors, values, strict=True):
                tensor.fill_(float(value))

    @contextmanager
    def nudged(self, arguments: Sequence[Tensor]) -> Iterator[None]:
        """Change all tensors a little, and restore them at the end.

        A run meanwhile shows which operations would not follow a change of the floats.

        :param arguments: the tensors in place of arguments.
        """
        tensors = [tensor for attribute in self.attributes for tensor in attribute.tensors]
        tensors += arguments
        before = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.copy_(torch.where(tensor == 0, 1e-6, tensor * (1 - 1e-6)))
        try:
            yield
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)

    @property
    def matches(self) -> bool:
        """Whether every lifted attribute is still a float, or a tuple of the same length."""
        return all(
            (type(holder[key]) is tuple) == (kind is tuple)
            and len(_floats(holder[key])) == len(tensors)
            for holder, key, _, kind, tensors in self.attributes
        )


def _floats(value: Any) -> tuple[float, ...]:
    """Return the floats in a value, or () if it is neither a float nor a tuple of floats."""
    entries = value if type(value) is tuple else (value,)
    is_lifted = all(type(entry) in FLOATS and not math.isinf(entry) for entry in entries)
    return entries if is_lifted else ()


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
