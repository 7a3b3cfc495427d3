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
    """An entry of a mapping or list, an attribute, or the cell of a closure."""

    holder: Any
    key: Any
    label: str
    is_state: bool = False  # a parameter or buffer of a module
    is_slot: bool = False

    def get(self) -> Any:
        """What is there now."""
        try:
            if self.is_slot:
                return getattr(self.holder, self.key)
            return self.holder.cell_contents if self.key is None else self.holder[self.key]
        except (KeyError, IndexError, ValueError, AttributeError):
            return MISSING

    def put(self, value: Any) -> None:
        """Puts something back."""
        if self.is_slot:
            setattr(self.holder, self.key, value)
        elif self.key is None:
            self.holder.cell_contents = value
        else:
            self.holder[self.key] = value


class GeneratorState:
    """A generator of NumPy, and its state of now."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.bits = generator.bit_generator
        self.state = self.bits.state

    @property
    def has_changed(self) -> bool:
        """Whether numbers were drawn since."""
        return str(self.bits.state) != str(self.state)

    def restore(self) -> None:
        """Goes back to the state."""
        self.bits.state = self.state


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
    #: Generators of NumPy, which the programs are not to use.
    generators: list[tuple[str, GeneratorState]] = field(default_factory=list)

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
        for label, generator in self.generators:
            if generator.has_changed:
                return label
        return self.changed()

    def restore(self) -> None:
        """Puts back what programs have put elsewhere."""
        for place, value in [*self.objects, *self.tensors]:
            if place.get() is not value and isinstance(place.holder, (dict, list)):
                place.put(value)
        for _, generator in self.generators:
            generator.restore()

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where a tensor was found."""
        for place, known in self.tensors:
            if known is tensor:
                return place
        return None


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
