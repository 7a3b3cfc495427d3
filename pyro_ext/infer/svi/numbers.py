from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class LiftedNumbers:
    """Numbers of an objective, such as an alpha, as tensors that a graph reads.

    Entering it puts the tensors in place of the numbers, leaving it puts the numbers back.

    :param objectives: names, and objects whose attributes are lifted where they are floats or
        tuples of floats.
    """

    def __init__(self, objectives: list[tuple[str, Any]]) -> None:
        self.entries: list[tuple[dict[str, Any], str, Any]] = []
        self.labels: list[str] = []
        for label, owner in objectives:
            for key, value in getattr(owner, "__dict__", {}).items():
                if _is_number(value) or _is_tuple_of_numbers(value):
                    self.entries.append((vars(owner), key, _tensors(value)))
                    self.labels.append(f"{label}.{key}")
        self._numbers: list[Any] = []

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
            value = holder[key]
            if isinstance(tensors, Tensor):
                tensors.fill_(value)
            else:
                for tensor, number in zip(tensors, value, strict=True):
                    tensor.fill_(number)


def _is_number(value: Any) -> bool:
    return type(value) is float and value not in (float("inf"), float("-inf"))


def _is_tuple_of_numbers(value: Any) -> bool:
    return type(value) is tuple and len(value) > 0 and all(_is_number(entry) for entry in value)


def _tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_tensors(entry) for entry in value)
    return torch.tensor(value, dtype=torch.float64)
