from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class LiftedFloats:
    """Numbers that may change between steps, as tensors that a graph reads.

    They are floats, and tuples of floats, among the attributes of an objective (such as an
    alpha), and floats among the arguments. Entering it puts the tensors in place of the
    attributes, leaving it puts the numbers back.

    :param objectives: names, and objects whose attributes are lifted.
    :param bool is_on: whether anything is lifted.
    """

    def __init__(self, objectives: list[tuple[str, Any]], is_on: bool = True) -> None:
        self.is_on = is_on
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        self.labels: list[str] = []
        for label, owner in objectives if is_on else ():
            for key, value in getattr(owner, "__dict__", {}).items():
                if _is_number(value) or _is_tuple_of_numbers(value):
                    self.entries.append((vars(owner), key, _tensors(value)))
                    self.labels.append(f"{label}.{key}")
        self._numbers: list[Any] = []

    def lift(self, leaves: Sequence[Any]) -> list[Any]:
        """Arguments with tensors in place of floats."""
        if not self.is_on:
            return list(leaves)
        return [_tensors(leaf) if type(leaf) is float else leaf for leaf in leaves]

    def __enter__(self) -> None:
        self.update()
        self._numbers = [holder[key] for holder, key, _ in self.entries]
        for holder, key, tensors in self.entries:
            holder[key] = tensors

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for (holder, key, _), number in zip(self.entries, self._numbers, strict=True):
            holder[key] = number

    def update(self) -> None:
        """Copies the numbers of now into the tensors."""
        for holder, key, tensors in self.entries:
            for tensor, number in _pairs(tensors, holder[key]):
                tensor.fill_(number)

    @contextmanager
    def nudged(self, arguments: Sequence[Tensor]) -> Iterator[None]:
        """Changes all tensors a little for a while, to find out what would not follow.

        :param arguments: the tensors in place of arguments.
        """
        tensors = [tensor for _, _, entry in self.entries for tensor, _ in _pairs(entry, entry)]
        tensors += arguments
        numbers = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            tensor.copy_(torch.where(tensor == 0, 1e-6, tensor * (1 - 1e-6)))
        try:
            yield
        finally:
            for tensor, number in zip(tensors, numbers, strict=True):
                tensor.copy_(number)

    @property
    def matches(self) -> bool:
        """Whether every lifted attribute is still a float, or a tuple of as many."""
        return all(
            len(holder[key]) == len(tensors)
            if isinstance(tensors, tuple) and _is_tuple_of_numbers(holder[key])
            else isinstance(tensors, Tensor) and _is_number(holder[key])
            for holder, key, tensors in self.entries
        )


def _pairs(tensors: Any, numbers: Any) -> list[tuple[Tensor, Any]]:
    if isinstance(tensors, Tensor):
        return [(tensors, numbers)]
    return list(zip(tensors, numbers, strict=True))


def _is_number(value: Any) -> bool:
    return type(value) is float and value not in (float("inf"), float("-inf"))


def _is_tuple_of_numbers(value: Any) -> bool:
    return type(value) is tuple and len(value) > 0 and all(_is_number(entry) for entry in value)


def _tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_tensors(entry) for entry in value)
    return torch.tensor(value, dtype=torch.float64)
