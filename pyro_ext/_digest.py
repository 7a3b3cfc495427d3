"""A digest of tensors, numbers, strings and containers of these."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def digest(value: Any) -> str:
    """Return a digest that differs for different values, in any process.

    Of an object that is neither a tensor, an array, a number, a string nor a container of these,
    only the type counts.
    """
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: Any) -> None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        _feed_bytes(hasher, f"array {value.dtype} {value.shape}", np.ascontiguousarray(value))
    elif isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        flat = dense.cpu().resolve_conj().resolve_neg().reshape(-1).contiguous()
        header = f"tensor {value.dtype} {tuple(value.shape)}"
        _feed_bytes(hasher, header, flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        hasher.update(f"dict {len(value)};".encode())
        for item in value.items():
            _feed(hasher, item)
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{'list' if isinstance(value, list) else 'tuple'} {len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    else:
        kind = type(value)
        text = repr(value) if isinstance(value, (*_PLAIN, np.generic)) else ""
        hasher.update(f"{kind.__module__}.{kind.__qualname__} {len(text)} {text};".encode())


def _feed_bytes(hasher: Any, header: str, content: Any) -> None:
    hasher.update(f"{header};".encode())
    hasher.update(memoryview(content).cast("B") if content.size else b"")
