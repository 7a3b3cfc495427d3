"""Finds the values that programs reach by name.

These are attributes, globals, variables of closures, items of containers, and defaults.
"""

import argparse
import contextlib
import enum
import io
import random
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import cached_property, partial, partialmethod
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext._digest import digest
from pyro_ext._private.of_torch import (
    buffers_of,
    children_of,
    hooks_of,
    parameters_of,
)
from pyro_ext.infer.svi.capture.operation_log import CaptureError
from pyro_ext.infer.svi.capture.reachable_state import (
    ALL,
    MISSING,
    Entries,
    Generator,
    Place,
    ReachableState,
    Snapshot,
    printable,
)
from pyro_ext.tracing.names_in_code import LIBRARIES, names_in, slots_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum)
#: Objects of libraries that hold values of the user.
_HOLDERS = (SimpleNamespace, argparse.Namespace, UserDict, UserList)
_KNOWN = (nn.Module, ELBO, Messenger, Distribution, contextlib.ContextDecorator)
_FOLLOWED = (FunctionType, MethodType, partial, nn.Module, Distribution)
_METHODS = (FunctionType, staticmethod, classmethod, property, cached_property, partialmethod)
_STATEFUL = {"builtins", "collections"}
_MAX_DEPTH, _MAX_PLACES = 8, 20_000
#: The largest container of plain values, and the largest array, that are compared at each step.
_MAX_PLAIN, _MAX_ARRAY = 1_000, 10_000
#: The largest array that is copied for a capture.
_MAX_BYTES = 100_000_000
#: Libraries and classes that use no attribute of an object whose class is derived from theirs.
_BARE = {"abc", "argparse", "builtins", "types", "typing"}
_BASES = (nn.Module, PyroModule, Messenger)


def find_reachable(
    roots: Iterable[tuple[str, Any]],
    ignored: Iterable[Place] = (),
    limit: float = _MAX_PLACES,
    keeps_large: bool = False,
) -> ReachableState:
    """Find all values that can be reached by name from some objects.

    A foreign object that raises an error when it is looked at is compared by identity alone.

    :param roots: the objects, with their names: programs, modules, objectives and arguments.
    :param ignored: the places of values that may change, which are left out.
    :param limit: the largest number of values.
    :param keeps_large: whether to keep copies of large containers and arrays, too.
    :returns: the values.
    :raises CaptureError: if there are more values than ``limit``.
    """
    pending = deque((name, value, 0) for name, value in roots)
    known = {(id(place.holder), place.key) for place in ignored}
    return _Search(limit, keeps_large, pending, places=known).run()


@dataclass
class _Search:
    """A breadth-first search through objects."""

    limit: float
    keeps_large: bool
    pending: deque[tuple[str, Any, int]]
    found: ReachableState = field(default_factory=ReachableState)
    seen: dict[int, Any] = field(default_factory=dict)  # by identity, kept alive
    places: set[tuple[int, Any]] = field(default_factory=set)
    attribute_names: set[str] = field(default_factory=lambda: {"forward"})
    #: Names of attributes that code sets. They matter if they hold tensors, which users may read.
    stored_names: set[str] = field(default_factory=set)
    #: Methods, attributes and entries of modules. They are followed once code uses their name.
    waiting: dict[str, list[tuple[Place, int]]] = field(default_factory=dict)

    def run(self) -> ReachableState:
        """Visit all pending values and the values that they lead to."""
        while self.pending:
            label, value, depth = self.pending.popleft()
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                try:
                    self._look_at(label, value, depth)
                except CaptureError:
                    raise
                except Exception:  # a foreign object, whose place is compared by identity
                    continue
        return self.found

    def _look_at(self, label: str, value: Any, depth: int) -> None:
        if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
            self._look_at_generator(label, value)
        elif isinstance(value, FunctionType):
            self._look_at_function(value, depth)
        elif isinstance(value, MethodType):
            self.pending.append((label, value.__func__, depth))
            self.pending.append((type(value.__self__).__name__, value.__self__, depth))
        elif isinstance(value, (partial, partialmethod)):
            self.pending.append((label, value.func, depth))
            self._look_at_container(label, value.args, depth)
            self._look_at_container(label, value.keywords, depth)
        elif isinstance(value, ModuleType):
            if _library(value.__name__) not in LIBRARIES:
                for key in vars(value):
                    self._add_once_named(Place(vars(value), key, f"{label}.{key}"), depth)
        elif isinstance(value, (dict, list, tuple, deque, set, frozenset)):
            self._look_at_container(label, value, depth)
        elif isinstance(value, type):
            self._look_at_class(value, depth)
        elif isinstance(value, property):
            self.pending += [(label, f, depth) for f in (value.fget, value.fset) if f is not None]
        elif isinstance(value, cached_property):
            self.pending.append((label, value.func, depth))
        elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
            self.found.iterators.append(label)
        else:
            self._look_at_instance(label, value, depth)

    def _look_at_generator(self, label: str, value: Any) -> None:
        read: Callable[[], Any]
        put_back: Callable[[Any], None]
        if isinstance(value, random.Random):
            read, put_back = value.getstate, value.setstate
        elif isinstance(value, np.random.RandomState):
            read, put_back = value.get_state, value.set_state
        else:
            bits = value.bit_generator
            read, put_back = lambda: bits.state, partial(setattr, bits, "state")
        self.found.generators.append(Generator(label, read, put_back, read()))

    def _look_at_function(self, function: FunctionType, depth: int) -> None:
        code, name = function.__code__, function.__name__
        is_library = _library(function.__globals__.get("__name__")) in LIBRARIES
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            place = Place(cell, "cell_contents", variable, is_attribute=True)
            # A decorator of a library holds the function that it decorates.
            if not is_library or isinstance(place.get(), _FOLLOWED):
                self._add(place, depth)
        for key in vars(function):
            place = Place(vars(function), key, f"{name}.{key}")
            if key == "__wrapped__":
                self._add(place, depth)
            elif not is_library:
                self._add_once_named(place, depth)
        if is_library:
            return
        for i in range(len(function.__defaults__ or ())):
            self._add(Place(function.__defaults__, i, f"default {i} of {name}"), depth)
        for key in ("__code__", "__defaults__", "__kwdefaults__"):
            self._add(Place(function, key, f"{name}.{key}", is_attribute=True), depth)
        global_names, attribute_names, stored = names_in(code)
        for variable in sorted((global_names | stored) & function.__globals__.keys()):
            place = Place(function.__globals__, variable, variable)
            if variable in global_names or _holds_tensors(place):
                self._add(place, depth)
        for key in sorted((attribute_names | stored) - self.attribute_names):
            if key in attribute_names:
                self.attribute_names.add(key)
            self.stored_names.add(key)
            for place, depth_of_place in self.waiting.pop(key, ()):
                self._add_once_named(place, depth_of_place)

    def _look_at_container(self, label: str, value: Any, depth: int) -> None:
        is_frozen = isinstance(value, (tuple, frozenset))
        if _is_plain(value):
            if not is_frozen:
                self._compare_contents(label, value)
            return
        if isinstance(value, (set, frozenset)):
            self.pending += [(f"an entry of {label}", item, depth + 1) for item in value]
            identities = lambda: frozenset(map(id, value))  # noqa: E731
            self.found.snapshots.append(Snapshot(label, identities, identities()))
        else:
            for key in value if isinstance(value, dict) else range(len(value)):
                self._add(Place(value, key, f"{label}[{printable(key)}]"), depth)
        if is_frozen:
            return
        if isinstance(value, dict):
            names = None if len(value) <= _MAX_PLAIN else ALL
            self.found.entries.append(Entries(label, value, dict(value), names))
        elif isinstance(value, (list, deque)):
            self._compare_contents(label, value, has_places=True)

    def _compare_contents(self, label: str, value: Any, has_places: bool = False) -> None:
        """Compare the contents of a container, or only their number.

        :param label: the name of the container.
        :param value: the container.
        :param has_places: whether each entry has a place of its own.
        """
        copy = value.copy()  # of a subclass, perhaps an instance of the base class
        convert = type(copy) if type(copy) is not type(value) else lambda x: x

        def put_back() -> None:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(copy)

        whole = Snapshot(label, lambda: convert(value), copy, put_back)
        if not has_places and len(value) <= _MAX_PLAIN:
            self.found.snapshots.append(whole)
            return
        self.found.snapshots.append(Snapshot(label, lambda: len(value), len(value), put_back))
        if self.keeps_large and not has_places:
            self.found.large.append(whole)

    def _look_at_class(self, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if id(base) in self.seen and base is not cls:
                continue
            self.seen[id(base)] = base
            if _library(getattr(base, "__module__", "")) in LIBRARIES:
                continue
            namespace = vars(base)
            names = self.attribute_names
            self.found.entries.append(Entries(base.__name__, namespace, dict(namespace), names))
            for key, value in namespace.items():
                is_special = key.startswith("__") and key.endswith("__")
                place = Place(namespace, key, f"{base.__name__}.{key}", owner=base)
                if isinstance(value, _METHODS):
                    # No name in the code of a program shows the use of a special method.
                    (self._add if is_special else self._add_once_named)(place, depth)
                elif not is_special and not hasattr(value, "__get__"):
                    self._add(place, depth)

    def _look_at_instance(self, label: str, value: Any, depth: int) -> None:
        cls = type(value)
        library = _library(getattr(cls, "__module__", ""))
        is_library = library in LIBRARIES and not isinstance(value, _HOLDERS)
        attributes = getattr(value, "__dict__", {})
        for key in ("__wrapped__", "__func__"):  # such as a function with a cache
            wrapped = getattr(value, key, None)
            if isinstance(wrapped, FunctionType):
                self.pending.append((label, wrapped, depth))
        is_unknown = is_library and not isinstance(value, _KNOWN) and library != "pyro_ext"
        if is_unknown or isinstance(value, SVI):
            return
        internal = vars(nn.Module()) if isinstance(value, nn.Module) else {}
        if isinstance(value, nn.Module):
            self._look_at_module(label, value, depth)
        # The code of a library may use any attribute of an object whose class is derived from it.
        add = self._add if is_library or _has_library_base(cls) else self._add_once_named
        for key, entry in attributes.items():
            if key in internal and key != "training":
                continue
            # Objects of libraries make other objects in each run, and cache tensors.
            is_hidden = key.startswith("_") and isinstance(entry, Tensor)
            is_known = isinstance(entry, (*_PLAIN, Tensor, *_FOLLOWED)) and not is_hidden
            is_option = isinstance(value, Messenger) and isinstance(entry, dict)
            if not is_library or is_known or is_option:
                add(Place(attributes, key, f"{label}.{key}"), depth)
        if internal or not is_library:
            names = self.attribute_names
            self.found.entries.append(Entries(label, attributes, dict(attributes), names))
        if not is_library:
            self._add(Place(value, "__class__", f"{label}.__class__", is_attribute=True), depth)
            for key in (key for base in cls.__mro__ for key in slots_of(base)):
                self._add(Place(value, key, f"{label}.{key}", is_attribute=True), depth)

    def _look_at_module(self, label: str, module: nn.Module, depth: int) -> None:
        state = [parameters_of(module), buffers_of(module)]
        others: list[dict[Any, Any]] = [children_of(module), *hooks_of(module)]
        for holder in state:
            for key in holder:
                self._add(Place(holder, key, f"{label}.{key}", is_state=True), depth)
        for holder in others:
            for key in holder:
                self._add(Place(holder, key, f"{label}.{key}"), depth - 1)
        self.found.entries += [Entries(label, x, dict(x), ALL) for x in (*state, *others)]
        # Sequential replaces the dict of its children if one is deleted.
        for key, entry in vars(module).items():
            if any(entry is holder for holder in (*state, others[0])):
                place = Place(vars(module), key, f"{label}.{key}")
                self.found.objects.append((place, entry))
        # A parametrisation replaces the class.
        self._add(Place(module, "__class__", f"{label}.__class__", is_attribute=True), depth)

    def _add_once_named(self, place: Place, depth: int) -> None:
        is_stored = place.key in self.stored_names and _holds_tensors(place)
        if is_stored or place.key in self.attribute_names:
            self._add(place, depth)
        else:
            self.waiting.setdefault(place.key, []).append((place, depth))

    def _add(self, place: Place, depth: int) -> None:
        entry = place.get()
        where = id(place.holder), place.key
        if entry is MISSING or where in self.places:
            return
        self.places.add(where)
        if len(self.places) > self.limit:
            raise CaptureError(
                f"the model and guide reach more than {self.limit} values by name, too many to "
                f"compare at each step. The last one is '{place.label}'; keep large data in tensors"
            )
        if isinstance(entry, Tensor):
            self.found.tensors.append((place, entry))
            return
        self.found.objects.append((place, entry))
        if isinstance(entry, _PLAIN):
            return
        if isinstance(entry, np.ndarray):
            self._compare_array(place, entry)
            return
        if type(entry).__module__ in _STATEFUL and _size(entry) <= _MAX_PLAIN:
            self.found.printed.append((place, printable(entry)))
        if depth < _MAX_DEPTH:
            self.pending.append((place.label, entry, depth + 1))

    def _compare_array(self, place: Place, array: np.ndarray) -> None:
        is_small = array.size <= _MAX_ARRAY
        if array.dtype.hasobject or not (is_small or self.keeps_large):
            return
        into = self.found.snapshots if is_small else self.found.large
        if array.nbytes <= _MAX_BYTES:
            copy = array.copy()
            put_back = partial(np.copyto, array, copy)
            into.append(Snapshot(place.label, place.get, copy, put_back))
        else:
            into.append(Snapshot(place.label, lambda: digest(place.get()), digest(array)))


def _holds_tensors(place: Place) -> bool:
    value = place.get()
    return isinstance(value, Tensor) or (isinstance(value, tuple) and not _is_plain(value))


def _library(module: Any) -> str:
    return str(module).partition(".")[0]


def _has_library_base(cls: type) -> bool:
    return any(
        _library(base.__module__) in LIBRARIES - _BARE and base not in _BASES
        for base in cls.__mro__
    )


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) and not isinstance(value, type) else 0


def _is_plain(value: Any) -> bool:
    """Return whether a container holds only numbers, strings, and containers of these."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, (list, tuple, deque, set, frozenset)) and all(map(_is_plain, value))
