"""Records the values on which a captured graph depends, and the places of its tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

MISSING = object()
#: The largest size of a container or array that is compared by its entries.
MAX_ITEMS = 100


@dataclass(frozen=True)
class Place:
    """A place that holds a value: an entry of a mapping or list, or an attribute."""

    holder: Any
    key: Any
    label: str
    is_state: bool = False  # a parameter or buffer of a module
    is_attribute: bool = False  # a slot, or the contents of a closure's cell

    def get(self) -> Any:
        """Return the current value at this place, or ``MISSING``."""
        try:
            return getattr(self.holder, self.key) if self.is_attribute else self.holder[self.key]
        except (KeyError, IndexError, ValueError, AttributeError):
            return MISSING


@dataclass
class ReachableState:
    """The values that programs reach by name, to be compared, and the tensors, to be read again."""

    #: Places of numbers, strings and other objects, which must stay the same.
    objects: list[tuple[Place, Any]] = field(default_factory=list)
    #: Containers and arrays with copies. They must stay equal to the copies.
    copies: list[tuple[str, Callable[[], Any], Any]] = field(default_factory=list)
    #: Places of tensors. Each step may find another tensor there.
    tensors: list[tuple[Place, Tensor]] = field(default_factory=list)
    #: The ``repr`` of containers and counters. It shows whether the programs change them.
    printed: list[tuple[Place, str]] = field(default_factory=list)
    #: Generators of NumPy with their states. The programs must not use them.
    generators: list[tuple[str, np.random.BitGenerator, Any]] = field(default_factory=list)

    @property
    def state(self) -> dict[str, Tensor]:
        """The parameters and buffers of modules, by unique labels."""
        found: dict[str, Tensor] = {}
        for place, tensor in self.tensors:
            if place.is_state:
                label = place.label
                while label in found:
                    label += "'"
                found[label] = tensor
        return found

    def changed(self) -> str | None:
        """Return the label of the first value that has changed, or None."""
        for place, value in self.objects:
            now = place.get()
            if now is not value and not (type(now) is type(value) and _is_equal(now, value)):
                return place.label
        for label, read, value in self.copies:
            if not _is_equal(read(), value):
                return label
        return None

    def changed_by_programs(self) -> str | None:
        """Return the label of the first value that runs of the programs have changed, or None.

        Unlike :meth:`changed`, it includes tensors, generators and counters.
        """
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
        """Restore the values that the programs have replaced."""
        for place, value in [*self.objects, *self.tensors]:
            if place.get() is not value and isinstance(place.holder, (dict, list)):
                place.holder[place.key] = value
        for _, generator, state in self.generators:
            generator.state = state

    def place_of(self, tensor: Tensor) -> Place | None:
        """Return the place of a tensor, or None."""
        return next((place for place, known in self.tensors if known is tensor), None)


def printable(value: Any) -> str:
    """Return the ``repr`` of an object, or an empty string if it fails."""
    try:
        return repr(value)
    except Exception:
        return ""


def _is_equal(now: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return isinstance(now, np.ndarray) and np.array_equal(now, value)
    return isinstance(value, _EQUATABLE) and bool(now == value)


_EQUATABLE = (bool, int, float, complex, str, bytes, tuple, list, set, frozenset, np.generic)
