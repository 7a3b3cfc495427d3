"""Finds the values that programs reach by name.

These are attributes, globals, variables of closures, items of containers, and defaults.
"""

import argparse
import dis
import enum
import sys
from collections import deque
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_ext._private.of_torch import buffers_of, children_of, parameters_of
from pyro_ext.infer.svi.capture.operation_log import CaptureError
from pyro_ext.infer.svi.capture.reachable_state import (
    MAX_ITEMS,
    MISSING,
    Place,
    ReachableState,
    printable,
)

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum)
_LIBRARIES = {"numpy", "pyro", "torch", "pyro_ext", "functools", "tqdm", *sys.stdlib_module_names}
_LIBRARIES -= {"__main__"}
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_KNOWN = (nn.Module, ELBO, Messenger, Distribution)
_FOLLOWED = (FunctionType, MethodType, partial, nn.Module, Distribution)
_STATEFUL = {"builtins", "collections", "itertools"}
_MAX_DEPTH, _MAX_PLACES = 8, 20_000


def find_reachable(
    roots: Iterable[tuple[str, Any]], unless: Iterable[str] = (), limit: float = _MAX_PLACES
) -> ReachableState:
    """Find all values that can be reached by name from some objects.

    :param roots: the objects, with their names: programs, modules, objectives and arguments.
    :param unless: the labels of values that may change, which are left out.
    :param limit: the largest number of values.
    :returns: the values.
    :raises CaptureError: if there are more values than ``limit``.
    """
    pending = deque((name, value, 0) for name, value in roots)
    return _Search(set(unless), limit, pending).run()


@dataclass
class _Search:
    """A breadth-first search through objects."""

    ignored: set[str]
    limit: float
    pending: deque[tuple[str, Any, int]]
    found: ReachableState = field(default_factory=ReachableState)
    seen: dict[int, Any] = field(default_factory=dict)  # by identity, kept alive
    places: set[tuple[int, Any]] = field(default_factory=set)
    attribute_names: set[str] = field(default_factory=lambda: {"forward", "__call__"})
    #: Methods, properties and entries of modules. They are followed once code uses their name.
    waiting: dict[str, list[tuple[str, Any, int]]] = field(default_factory=dict)

    def run(self) -> ReachableState:
        """Visit all pending values and the values that they lead to."""
        while self.pending:
            label, value, depth = self.pending.popleft()
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                self._look_at(label, value, depth)
        return self.found

    def _look_at(self, label: str, value: Any, depth: int) -> None:
        if isinstance(value, np.random.Generator):
            generator = value.bit_generator
            self.found.generators.append((label, generator, generator.state))
        elif isinstance(value, FunctionType):
            if _library(value.__globals__.get("__name__")) not in _LIBRARIES:
                self._look_at_function(value, depth)
        elif isinstance(value, MethodType):
            self.pending.append((label, value.__func__, depth))
            self.pending.append((type(value.__self__).__name__, value.__self__, depth))
        elif isinstance(value, partial):
            self.pending.append((label, value.func, depth))
            self._look_at(label, value.args, depth)
            self._look_at(label, value.keywords, depth)
        elif isinstance(value, ModuleType):
            if _library(value.__name__) not in _LIBRARIES:
                for key in vars(value):
                    place = Place(vars(value), key, f"{label}.{key}")
                    self._follow_once_named(key, place.label, place, depth)
        elif isinstance(value, (dict, list, tuple)):
            self._look_at_container(label, value, depth)
        elif isinstance(value, type):
            self._look_at_class(label, value, depth)
        else:
            self._look_at_instance(label, value, depth)

    def _look_at_function(self, function: FunctionType, depth: int) -> None:
        code = function.__code__
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._add(Place(cell, "cell_contents", variable, is_attribute=True), depth)
        global_names, attribute_names = _names(code)
        for variable in sorted(global_names & function.__globals__.keys()):
            self._add(Place(function.__globals__, variable, variable), depth)
        for i, default in enumerate(function.__defaults__ or ()):
            if not isinstance(default, _PLAIN):
                self.pending.append((f"default {i} of {function.__name__}", default, depth + 1))
        for name in sorted(attribute_names - self.attribute_names):
            self.attribute_names.add(name)
            for waiting in self.waiting.pop(name, ()):
                self._follow(*waiting)

    def _look_at_container(self, label: str, value: Any, depth: int) -> None:
        if len(value) > MAX_ITEMS:
            return
        for key in value if isinstance(value, dict) else range(len(value)):
            self._add(Place(value, key, f"{label}[{key!r}]"), depth)
        if isinstance(value, dict):
            self.found.copies.append((label, lambda: tuple(value), tuple(value)))
        elif isinstance(value, list):
            self.found.copies.append((label, lambda: len(value), len(value)))

    def _look_at_class(self, label: str, cls: type, depth: int) -> None:
        for base in cls.__mro__:
            if _library(getattr(base, "__module__", "")) in _LIBRARIES:
                continue
            for key, value in vars(base).items():
                function = value.fget if isinstance(value, property) else value
                if isinstance(value, (staticmethod, classmethod)):
                    function = value.__func__
                if isinstance(function, FunctionType):
                    self._follow_once_named(key, label, function, depth)
                elif not key.startswith("__") and not hasattr(value, "__get__"):
                    self._add(Place(vars(base), key, f"{base.__name__}.{key}"), depth)

    def _look_at_instance(self, label: str, value: Any, depth: int) -> None:
        cls = type(value)
        library = _library(getattr(cls, "__module__", ""))
        is_library = library in _LIBRARIES and not isinstance(value, _NAMESPACES)
        if is_library and not isinstance(value, _KNOWN) and library != "pyro_ext":
            return
        if isinstance(value, nn.Module):
            for holder in (parameters_of(value), buffers_of(value)):
                for key in holder:
                    self._add(Place(holder, key, f"{label}.{key}", is_state=True), depth)
            for key in children_of(value):
                self._add(Place(children_of(value), key, f"{label}.{key}"), depth - 1)
        attributes = getattr(value, "__dict__", {})
        internal = vars(nn.Module()) if isinstance(value, nn.Module) else {}
        for key, entry in attributes.items():
            if key in internal and key != "training":
                continue
            # Objects of libraries make other objects in each run, and cache tensors.
            is_hidden = key.startswith("_") and isinstance(entry, Tensor)
            is_known = isinstance(entry, (*_PLAIN, Tensor, *_FOLLOWED)) and not is_hidden
            is_option = isinstance(value, Messenger) and isinstance(entry, dict)
            if not is_library or is_known or is_option:
                self._add(Place(attributes, key, f"{label}.{key}"), depth)
        if not is_library:
            self._look_at_class(label, cls, depth)
            self.found.copies.append((label, lambda: tuple(attributes), tuple(attributes)))
            for key in (key for base in cls.__mro__ for key in _slots(base)):
                self._add(Place(value, key, f"{label}.{key}", is_attribute=True), depth)

    def _follow_once_named(self, name: str, label: str, value: Any, depth: int) -> None:
        if name in self.attribute_names:
            self._follow(label, value, depth)
        else:
            self.waiting.setdefault(name, []).append((label, value, depth))

    def _follow(self, label: str, value: Any, depth: int) -> None:
        if isinstance(value, Place):
            self._add(value, depth)
        else:
            self.pending.append((label, value, depth))

    def _add(self, place: Place, depth: int) -> None:
        entry = place.get()
        where = id(place.holder), place.key
        if place.label in self.ignored or entry is MISSING or where in self.places:
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
        is_plain_list = isinstance(entry, list) and all(isinstance(x, _PLAIN) for x in entry)
        is_array = isinstance(entry, np.ndarray) and entry.size <= MAX_ITEMS
        is_set = isinstance(entry, (set, frozenset)) and len(entry) <= MAX_ITEMS
        if is_plain_list or is_array or is_set:
            self.found.copies.append((place.label, place.get, entry.copy()))
        if is_plain_list or isinstance(entry, _PLAIN):
            return
        if type(entry).__module__ in _STATEFUL and _size(entry) <= MAX_ITEMS:
            self.found.printed.append((place, printable(entry)))
        if depth < _MAX_DEPTH:
            self.pending.append((place.label, entry, depth + 1))


def _library(module: Any) -> str:
    return str(module).partition(".")[0]


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _size(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 0


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Return the names of globals and of attributes that code loads, also in nested code."""
    global_names, attribute_names, codes = set(), set(), [code]
    for part in codes:  # the loop also visits the codes that it appends
        codes += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                global_names.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attribute_names.add(instruction.argval)
    return global_names, attribute_names
