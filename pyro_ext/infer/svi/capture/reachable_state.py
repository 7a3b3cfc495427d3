"""Guards: what a captured graph took for granted, and where its tensors come from."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

MISSING = object()
#: Up to how many entries containers are compared, and arrays with a copy.
MAX_ITEMS = 100


@dataclass(frozen=True)
class Place:
    """An entry of a mapping or list, or an attribute."""

    holder: Any
    key: Any
    label: str
    is_state: bool = False  # a parameter or buffer of a module
    is_attribute: bool = False  # a slot, or the contents of a closure's cell

    def get(self) -> Any:
        """What is there now."""
        try:
            return getattr(self.holder, self.key) if self.is_attribute else self.holder[self.key]
        except (KeyError, IndexError, ValueError, AttributeError):
            return MISSING


@dataclass
class ReachableState:
    """All that programs can reach by names: values to compare, tensors to look up again."""

    #: Places with numbers, strings and other objects, which are to be the same.
    objects: list[tuple[Place, Any]] = field(default_factory=list)
    #: Containers and arrays with copies, which are to be equal.
    copies: list[tuple[str, Callable[[], Any], Any]] = field(default_factory=list)
    #: Places with tensors, which may be others at each step.
    tensors: list[tuple[Place, Tensor]] = field(default_factory=list)
    #: What containers and counters print, to find out whether the programs themselves use them.
    printed: list[tuple[Place, str]] = field(default_factory=list)
    #: Generators of NumPy, which the programs are not to use, with their states.
    generators: list[tuple[str, np.random.BitGenerator, Any]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers of modules, by labels made unique."""
        found: dict[str, Tensor] = {}
        for place, tensor in self.tensors:
            if place.is_state:
                label = place.label
                while label in found:
                    label += "'"
                found[label] = tensor
        return found

    def changed(self) -> str | None:
        """The label of the first value that is not what it was; None if all are."""
        for place, value in self.objects:
            now = place.get()
            if now is not value and not (type(now) is type(value) and _is_equal(now, value)):
                return place.label
        for label, read, value in self.copies:
            if not _is_equal(read(), value):
                return label
        return None

    def changed_by_programs(self) -> str | None:
        """As :meth:`changed`, right after runs: also for tensors, and for what counters print."""
        for place, printed in self.printed:
            if printable(place.get()) != printed:
                return place.label
        for place, tensor in self.tensors:
            if place.get() is not tensor:
                return place.label
        for label, generator, state in self.generators:
            if str(generator.state) != str(state):
                return label
        return self.changed()

    def restore(self) -> None:
        """Puts back what programs have put elsewhere."""
        for place, value in [*self.objects, *self.tensors]:
            if place.get() is not value and isinstance(place.holder, (dict, list)):
                place.holder[place.key] = value
        for _, generator, state in self.generators:
            generator.state = state

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor was found."""
        return next((place for place, known in self.tensors if known is tensor), None)


def printable(value: Any) -> str:
    """What an object prints, if it can."""
    try:
        return repr(value)
    except Exception:
        return ""


def _is_equal(now: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return isinstance(now, np.ndarray) and np.array_equal(now, value)
    return isinstance(value, _EQUATABLE) and bool(now == value)


_EQUATABLE = (bool, int, float, complex, str, bytes, tuple, list, set, frozenset, np.generic)
