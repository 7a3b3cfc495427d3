"""Guards: what a captured graph took for granted, and where its tensors come from."""

from collections import deque
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_LIBRARIES = {"builtins", "numpy", "pyro", "pyro_ext", "torch"}
_CONTAINERS = {"builtins", "collections", "itertools"}
_MAX_ITEMS = 100
_MAX_DEPTH = 2


@dataclass(frozen=True)
class Place:
    """An entry of a dictionary (attributes, globals, items) or the cell of a closure."""

    holder: Any
    key: Any
    label: str
    is_state: bool = False  # a parameter or buffer of a module

    def get(self) -> Any:
        """What is there now."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.key, _MISSING)
        try:
            return self.holder.cell_contents
        except ValueError:
            return _MISSING


@dataclass
class Surroundings:
    """All that programs can reach by names: plain values to compare, tensors to look up again."""

    plain: list[tuple[Place, Any]] = field(default_factory=list)
    tensors: dict[int, Place] = field(default_factory=dict)
    containers: list[tuple[Place, str]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of modules, by labels made unique."""
        found: dict[str, Tensor] = {}
        for place in self.tensors.values():
            if place.is_state:
                label = place.label
                while label in found:
                    label += "'"
                found[label] = place.get()
        return found

    def changed(self) -> str | None:
        """The label of the first plain value that is not what it was; None if all are."""
        for place, value in self.plain:
            now = place.get()
            if now is not value and (
                type(now) is not type(value) or isinstance(now, np.ndarray) or now != value
            ):
                return place.label
        return None

    def changed_by_programs(self) -> str | None:
        """As :meth:`changed`, and looks into containers and counters, too, by what they print."""
        for place, printed in self.containers:
            if repr(place.get()) != printed:
                return place.label
        return self.changed()


def look_around(roots: Iterable[tuple[str, Any]], unless: Iterable[str] = ()) -> Surroundings:
    """Everything plain, and every tensor, that is reachable by names from some objects.

    :param roots: names and objects: programs, modules, objectives, arguments.
    :param unless: labels of what may change.
    """
    surroundings = Surroundings()
    ignored = set(unless)
    seen: dict[int, Any] = {}  # by identity, kept alive
    pending = deque((name, value, 0) for name, value in roots)
    while pending:
        name, value, depth = pending.popleft()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, MethodType):
            pending.append((name, value.__func__, depth))
            pending.append((type(value.__self__).__name__, value.__self__, depth))
        elif isinstance(value, partial):
            pending.append((name, value.func, depth))
            pending.append((name, value.keywords, depth))
        for place in _places(name, value):
            entry = place.get()
            if place.label in ignored:
                continue
            if isinstance(entry, Tensor):
                surroundings.tensors.setdefault(id(entry), place)
            elif _is_plain(entry) or isinstance(entry, np.ndarray):
                kept = list(entry) if isinstance(entry, list) else entry
                surroundings.plain.append((place, kept))
            elif not isinstance(entry, type):
                if type(entry).__module__ in _CONTAINERS and _size(entry) <= _MAX_ITEMS:
                    surroundings.containers.append((place, repr(entry)))
                is_deep = isinstance(entry, (nn.Module, FunctionType, MethodType, partial))
                if is_deep or depth < _MAX_DEPTH:
                    pending.append((place.label, entry, depth + (not is_deep)))
    return surroundings


def _places(name: str, value: Any) -> Iterator[Place]:
    if isinstance(value, FunctionType):
        if _library(value) in _LIBRARIES:
            return
        for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield Place(cell, None, variable)
        for variable in sorted(_global_names(value.__code__)):
            if variable in value.__globals__:
                yield Place(value.__globals__, variable, variable)
    elif isinstance(value, dict):
        if len(value) <= _MAX_ITEMS:
            yield from (Place(value, key, f"{name}[{key!r}]") for key in value)
    elif not isinstance(value, (type, MethodType, partial)):
        yield from _attributes(name, value)


def _attributes(name: str, value: Any) -> Iterator[Place]:
    if isinstance(value, nn.Module):
        for holder in (value._parameters, value._buffers):
            yield from (Place(holder, key, f"{name}.{key}", is_state=True) for key in holder)
        yield from (Place(value._modules, key, f"{name}.{key}") for key in value._modules)
    elif _library(type(value)) in _LIBRARIES - {"pyro_ext"}:
        return
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        for key, entry in attributes.items():
            if not (isinstance(value, nn.Module) and key.startswith("_")) or _is_plain(entry):
                yield Place(attributes, key, f"{name}.{key}")


def _library(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]


def _global_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _global_names(constant)
    return names


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return len(value) <= _MAX_ITEMS and all(isinstance(entry, _PLAIN) for entry in value)
    return isinstance(value, _PLAIN)


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor that a graph reads is found at each step."""

    tensor: Tensor
    place: Place | None
    param: str | None

    def get(self, params: dict[str, Tensor]) -> Tensor | None:
        """The tensor that is there now, whether the same or another; None if there is none."""
        if self.param is not None:
            return params.get(self.param)
        if self.place is None:
            return self.tensor
        value = self.place.get()
        return value if isinstance(value, Tensor) else None


def find_source(tensor: Tensor, params: dict[str, Tensor], around: Surroundings) -> TensorSource:
    """Where an external tensor of a run is found: param store, a name, or by itself alone."""
    for name, param in params.items():
        if param is tensor:
            return TensorSource(tensor, None, name)
    return TensorSource(tensor, around.tensors.get(id(tensor)), None)


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def current_params() -> dict[str, Tensor]:
    """The unconstrained parameters in the param store, by name."""
    return dict(pyro.get_param_store().named_parameters())
