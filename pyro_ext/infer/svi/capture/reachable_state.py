"""Records the values on which a captured graph depends, and the places of its tensors."""

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MISSING = object()


@dataclass(frozen=True)
class Place:
    """A place that holds a value: an entry of a mapping or list, or an attribute."""

    holder: Any
    key: Any
    label: str
    is_state: bool = False  # a parameter or buffer of a module
    is_attribute: bool = False  # a slot, the contents of a closure's cell, or the like
    owner: Any = None  # the class whose namespace is the holder

    def get(self) -> Any:
        """Return the current value at this place, or ``MISSING``."""
        try:
            return getattr(self.holder, self.key) if self.is_attribute else self.holder[self.key]
        except Exception:  # a foreign object may raise anything
            return MISSING

    def put_back(self, value: Any) -> None:
        """Restore the value of this place, if it has changed and can be set."""
        if self.get() is not value:
            with suppress(Exception):
                if self.owner is not None:
                    setattr(self.owner, self.key, value)
                elif self.is_attribute:
                    setattr(self.holder, self.key, value)
                else:
                    self.holder[self.key] = value


class Snapshot(NamedTuple):
    """The contents of a container or array, of which the place alone shows no change."""

    label: str
    read: Callable[[], Any]
    contents: Any
    put_back: Callable[[], None] | None = None


class _All:
    def __contains__(self, key: object) -> bool:
        return True


#: The names of a namespace all of whose entries matter.
ALL = _All()


class Entries(NamedTuple):
    """The keys of a namespace or dict, each of whose entries has a place of its own.

    :ivar names: the keys that matter, in any order; None if all matter, and their order.
    """

    label: str
    namespace: Mapping[Any, Any]
    contents: dict[Any, Any]
    names: Container[Any] | None = None

    @property
    def has_changed(self) -> bool:
        """Whether the keys that matter are others."""
        if self.names is None:
            return [*self.namespace] != [*self.contents]
        if len(self.namespace) == len(self.contents):
            return False  # then the place of each key shows whether it is still there
        return any(
            key in self.names or (key.startswith("__") and key.endswith("__"))
            for key in self.namespace.keys() ^ self.contents.keys()
        )

    def put_back(self) -> None:
        """Remove new entries, and restore those that were removed."""
        namespace = self.namespace
        if isinstance(namespace, dict) and [*namespace] != [*self.contents]:
            entries = {key: namespace.get(key, x) for key, x in self.contents.items()}
            namespace.clear()
            namespace.update(entries)


class Generator(NamedTuple):
    """A random generator outside of torch, with its state."""

    label: str
    read: Callable[[], Any]
    put_back: Callable[[Any], None]
    state: Any


@dataclass
class ReachableState:
    """The values that programs reach by name, to be compared, and the tensors, to be read again."""

    #: Places of numbers, strings and other objects, which must stay the same.
    objects: list[tuple[Place, Any]] = field(default_factory=list)
    #: Contents of containers and arrays, which must stay equal.
    snapshots: list[Snapshot] = field(default_factory=list)
    #: Contents that are too large for a comparison at each step.
    large: list[Snapshot] = field(default_factory=list)
    #: Namespaces of objects, and dicts. They must have no new entries.
    entries: list[Entries] = field(default_factory=list)
    #: Places of tensors. Each step may find another tensor there.
    tensors: list[tuple[Place, Tensor]] = field(default_factory=list)
    #: Places where each run of the programs leaves a new tensor, and never reads the last one.
    kept: list[Place] = field(default_factory=list)
    #: The ``repr`` of containers and counters. It shows whether the programs change them.
    printed: list[tuple[Place, str]] = field(default_factory=list)
    #: Generators of NumPy and Python with their states. The programs must not use them.
    generators: list[Generator] = field(default_factory=list)
    #: Labels of iterators. A run of the programs might advance them, and nothing moves them back.
    iterators: list[str] = field(default_factory=list)

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

    @cached_property
    def _by_kind(self) -> tuple[list[tuple[Any, Any]], list[Any], list[tuple[Any, Any]], list[Any]]:
        entries = [(place, value) for place, value in self.objects if not place.is_attribute]
        attributes = [(place, value) for place, value in self.objects if place.is_attribute]
        return (
            [(place.holder, place.key) for place, _ in entries],
            [value for _, value in entries],
            [(place.holder, place.key) for place, _ in attributes],
            [value for _, value in attributes],
        )

    @cached_property
    def _by_size(self) -> tuple[list[Mapping[Any, Any]], list[int], list[Entries]]:
        """The namespaces whose size shows new entries, their sizes, and the other entries."""
        named = [x for x in self.entries if x.names is not None]
        ordered = [x for x in self.entries if x.names is None]
        return [x.namespace for x in named], [len(x.contents) for x in named], ordered

    def changed(self) -> str | None:
        """Return the label of the first value that has changed, or None."""
        if not self._all_identical():
            for place, value in self.objects:
                now = place.get()
                if now is not value and not _is_equal(now, value):
                    return place.label
        for label, read, contents, _ in self.snapshots:
            if not _is_equal(read(), contents):
                return label
        namespaces, sizes, ordered = self._by_size
        if [*map(len, namespaces)] != sizes or any(x.has_changed for x in ordered):
            for entries in self.entries:
                if entries.has_changed:
                    return entries.label
        return None

    def keep(self, is_kept: Callable[[Place, Tensor, Any], bool]) -> list[Tensor]:
        """Take the places whose tensor has been replaced out of those that must not change.

        :param is_kept: a function of a place, the last tensor and the value now there.
        :returns: the values now there.
        """
        others, kept = [], []
        for place, tensor in self.tensors:
            now = place.get()
            if now is not tensor and is_kept(place, tensor, now):
                self.kept.append(place)
                kept.append(now)
            else:
                others.append((place, tensor))
        self.tensors = others
        return kept

    @contextmanager
    def without_effect_on_kept(self) -> Iterator[None]:
        """Restore what runs of the programs in a block leave at the places of ``kept``."""
        before = [(place, place.get()) for place in self.kept]
        try:
            yield
        finally:
            for place, value in before:
                place.put_back(value)

    @property
    def has_other_entries(self) -> bool:
        """Whether a namespace has new entries, or lacks some."""
        return any(entries.has_changed for entries in self.entries)

    def _all_identical(self) -> bool:
        """Return whether every object is the same. This is fast, because it is so nearly always."""
        entries, values, attributes, attribute_values = self._by_kind
        try:
            return all(map(is_, [holder[key] for holder, key in entries], values)) and all(
                map(is_, [getattr(holder, key) for holder, key in attributes], attribute_values)
            )
        except Exception:
            return False

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
        for label, read, _, state in self.generators:
            if str(read()) != str(state):
                return label
        for label, read, contents, _ in self.large:
            if not _is_equal(read(), contents):
                return label
        return self.changed()

    def restore(self) -> None:
        """Restore the values that the programs have replaced."""
        for entries in self.entries:
            entries.put_back()
        for place, value in [*self.objects, *self.tensors]:
            place.put_back(value)
        for _, read, contents, put_back in [*self.snapshots, *self.large]:
            if put_back is not None and not _is_equal(read(), contents):
                with suppress(Exception):
                    put_back()
        for generator in self.generators:
            generator.put_back(generator.state)

    def places_of(self, tensor: Tensor) -> list[Place]:
        """Return all places of a tensor."""
        return [place for place, known in self.tensors if known is tensor]


def printable(value: Any) -> str:
    """Return the ``repr`` of an object, or an empty string if it fails."""
    try:
        return repr(value)
    except Exception:
        return ""


def _is_equal(now: Any, value: Any) -> bool:
    """Return whether two values are equal. NaN equals NaN, and foreign objects equal nothing."""
    if type(now) is not type(value):
        return False
    try:
        if isinstance(value, np.ndarray):
            return bool(np.array_equal(now, value, equal_nan=value.dtype.kind in "fc"))
        parameters = getattr(type(value), "__dataclass_params__", None)
        if not (getattr(parameters, "frozen", False) or isinstance(value, _EQUATABLE)):
            return False
        if now == value:
            return not isinstance(value, dict) or [*now] == [*value]  # the order matters
        if isinstance(value, (tuple, list, deque)):  # perhaps because of a NaN
            pairs = zip(now, value, strict=True)
        elif isinstance(value, dict):
            pairs = zip([*now, *now.values()], [*value, *value.values()], strict=True)
        else:
            return bool(now != now and value != value)
        return all(a is b or _is_equal(a, b) for a, b in pairs)
    except Exception:  # entries of containers may be foreign objects
        return False


_SCALARS = (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device, slice)
_EQUATABLE = (*_SCALARS, range, tuple, list, deque, dict, set, frozenset)
