"""Functions in place of those of torch that turn tensors into Python numbers."""

from collections.abc import Callable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Return what ``torch.nn.functional.one_hot`` returns."""
    if num_classes < 0:
        num_classes = int(tensor.max()) + 1
    zeros = tensor.new_zeros(*tensor.shape, num_classes)
    return zeros.scatter(-1, tensor.unsqueeze(-1), 1)


def get_item(x: Tensor, index: Any) -> Tensor:
    """Return what ``x[index]`` returns. Indices that are integer tensors without dims are kept."""
    entries = index if isinstance(index, tuple) else (index,)
    if not any(map(_is_scalar, entries)) or not all(map(_is_simple, entries)):
        return x[index]
    x = x[tuple(slice(None) if _is_scalar(entry) else entry for entry in entries)]
    dims = [entry for entry in entries if type(entry) is not int]
    ellipsis = next((i for i, entry in enumerate(dims) if entry is ...), len(dims))
    dims[ellipsis : ellipsis + 1] = [...] * (x.dim() - len(dims) + 1)
    for dim in reversed(range(x.dim())):
        if _is_scalar(dims[dim]):
            x = x[(slice(None),) * dim + (dims[dim].reshape(1),)].squeeze(dim)
    return x


def to_integer(x: Tensor) -> int:
    """Return what ``int(x)`` returns. Only the integer part of the value is read."""
    return x.long().__index__()


def _is_scalar(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dim() == 0 and entry.dtype in _INTEGERS


def _is_simple(entry: Any) -> bool:
    """Return whether an entry of an index adds or removes no dim other than its own."""
    is_plain = entry is None or type(entry) in (int, slice, EllipsisType)
    return is_plain or _is_scalar(entry)


#: function of torch -> a function that gives the same results
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    nn.functional.one_hot: one_hot,
    Tensor.__getitem__: get_item,
    Tensor.__int__: to_integer,
}
