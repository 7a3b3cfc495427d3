"""Fingerprints of what a model and a guide compute with, to notice that it has changed."""

import argparse
import enum
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from pyro_ext._digest import digest
from pyro_ext._private.of_pyro import samples_of
from pyro_ext._private.of_torch import buffers_of, children_of, parameters_of
from pyro_ext.tracing.names_in_code import LIBRARIES, names_in, slots_of
from pyro_ext.tracing.programs import Programs

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_PRINTED = (enum.Enum, torch.dtype, torch.device, range, slice)
_ITEMS = (dict, list, tuple, set, frozenset)
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_DENSITIES = (Distribution, Transform)
_KNOWN = (nn.Module, Messenger, PyroSample, *_DENSITIES)
_NAMED = (type, FunctionType, MethodType, BuiltinFunctionType, np.ufunc)
_MAX_VALUES = 20_000
_PYTHON = f"Python {sys.version_info.major}.{sys.version_info.minor}"


def arguments_fingerprint(programs: Programs) -> str:
    """Return a fingerprint of the arguments of model and guide."""
    roots = [("args", programs.args), ("kwargs", dict(programs.kwargs))]
    return digest(_Search(deque(roots), follows_all=True).run())


def programs_fingerprint(programs: Programs) -> dict[str, str]:
    """Return fingerprints of the values that model and guide reach by name, and of their code.

    These are all entries of the param store, parameters and buffers of modules, and the tensors and
    plain values in the globals, closures, defaults and attributes that the code names. No error is
    raised whatever the programs hold. Values that cannot be read are left out.

    :returns: a dict from a description of the value, such as ``"parameter 'loc'"``.
    """
    store = pyro.get_param_store()
    roots = [("model", programs.model), ("guide", programs.guide)]
    search = _Search(deque(roots), own={_package(_module_of(program)) for _, program in roots})
    for name in store.keys():  # noqa: SIM118
        search.add_leaf(parameter_label(name), store[name])
    return search.run()


def kind_label(label: str) -> str:
    """Return the description of the class of an object of a library."""
    return f"the kind of '{label}'"


def parameter_label(name: str) -> str:
    """Return the description of an entry of the param store."""
    return f"parameter '{name}'"


@dataclass
class _Search:
    """A breadth-first search through values.

    :ivar pending: values with their labels, not yet looked at.
    :ivar follows_all: whether to follow attributes that no code names.
    :ivar own: the packages of the user's programs, which may be installed ones.
    """

    pending: deque[tuple[str, Any]]
    follows_all: bool = False
    own: set[str] = field(default_factory=set)
    found: dict[str, str] = field(default_factory=dict)
    seen: dict[int, Any] = field(default_factory=dict)  # by identity, kept alive
    names: set[str] = field(default_factory=lambda: {"forward", "__call__"})
    #: Attributes, followed once code names them.
    waiting: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)

    def run(self) -> dict[str, str]:
        """Look at all pending values, and at the values that they lead to."""
        while self.pending and len(self.seen) < _MAX_VALUES:
            label, value = self.pending.popleft()
            if id(value) in self.seen:
                continue
            with suppress(Exception):  # foreign objects may raise whatever they like
                if _is_leaf(value):
                    self.add_leaf(f"'{label}'", value)
                else:
                    self.seen[id(value)] = value
                    self._add_kind(label, value)
                    self._look_at(label, value)
        return self.found

    def add_leaf(self, label: str, value: Any) -> None:
        """Add a tensor or a plain value."""
        if isinstance(value, Tensor):
            self.seen[id(value)] = value
        with suppress(Exception):
            self.found.setdefault(label, digest(_readable(value)))

    def _add_kind(self, label: str, value: Any) -> None:
        """Add the name of a class or function of a library. The user's own ones have code."""
        named = value if isinstance(value, _NAMED) else type(value)
        module = getattr(named, "__module__", None) or "torch"  # a function of C has none
        if self._is_library(module) and not isinstance(value, (*_ITEMS, ModuleType)):
            name = str(getattr(named, "__qualname__", named.__name__))
            self.found.setdefault(kind_label(label), digest(name))

    def _look_at(self, label: str, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._look_at_function(label, value)
        elif isinstance(value, MethodType):
            self._add(label, [("", value.__func__), ("", value.__self__)])
        elif isinstance(value, partial):
            self._add(label, [("", x) for x in (value.func, *value.args)])
            self._add(label, [(f".{key}", x) for key, x in value.keywords.items()])
        elif isinstance(value, _ITEMS):
            self._look_at_items(label, value)
        elif isinstance(value, ModuleType):
            if not self._is_library(value.__name__):
                self._follow_once_named(label, vars(value))
        elif isinstance(value, type):
            self._look_at_class(label, value)
        else:
            self._look_at_instance(label, value)

    def _look_at_function(self, label: str, function: FunctionType) -> None:
        attributes = vars(function)
        if self._is_library(function.__globals__.get("__name__")):
            # A decorator of a library around the user's function.
            self._add(label, [("", attributes.get("__wrapped__"))])
            return
        code = function.__code__
        content = _content(code, function.__doc__)
        self.found.setdefault(f"the code of '{label}' ({_PYTHON})", digest(content))
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with suppress(ValueError):  # an empty cell
                self._add(label, [(f".{name}", cell.cell_contents)])
        global_names, attribute_names, _ = names_in(code)
        named = sorted(global_names & function.__globals__.keys())
        self._add(label, [(f".{name}", function.__globals__[name]) for name in named])
        defaults = (function.__defaults__, function.__kwdefaults__)
        self._add(label, [(" (defaults)", x) for x in defaults if x])
        self._add(label, [(f".{name}", x) for name, x in attributes.items()])
        for name in sorted(attribute_names - self.names):
            self.names.add(name)
            self.pending.extend(self.waiting.pop(name, ()))

    def _look_at_items(self, label: str, value: Any) -> None:
        if isinstance(value, (set, frozenset)):
            items: Iterable[Any] = enumerate(sorted(value, key=repr))
        else:
            items = value.items() if isinstance(value, dict) else enumerate(value)
        leaves = []
        for i, (key, item) in enumerate(items):
            key = key if isinstance(key, (str, int)) else i
            if _is_leaf(item):
                leaves.append((key, _readable(item)))
            else:
                self.pending.append((f"{label}[{key!r}]", item))
        self.found.setdefault(f"'{label}'", digest([len(value), leaves]))

    def _look_at_class(self, label: str, cls: type) -> None:
        for base in cls.__mro__:
            if not self._is_library(getattr(base, "__module__", "")):
                self._follow_once_named(label, vars(base))

    def _look_at_instance(self, label: str, value: Any) -> None:
        cls = type(value)
        attributes = dict(getattr(value, "__dict__", {}))
        is_library = self._is_library(cls.__module__)
        if hasattr(value, "latent_names") and isinstance(value.prior, Distribution):
            # A BayesianModule draws these parameters, and does not use their values.
            self.seen |= {id(x): x for x in map(value.value_of, value.latent_names)}
        if isinstance(value, nn.Module):
            own = {**parameters_of(value), **buffers_of(value), **children_of(value)}
            own["training"] = value.training
            if isinstance(value, PyroModule):
                own |= samples_of(value)
            self._add(label, [(f".{key}", x) for key, x in own.items()])
            for key in vars(nn.Module()):
                attributes.pop(key, None)
        if is_library and isinstance(value, _KNOWN):
            # Their other objects are made anew at each run. Private tensors are caches, and tensors
            # of modules that are no buffers may be unused.
            followed = (*_ITEMS, FunctionType, MethodType, partial, nn.Module, *_DENSITIES)
            unused = Tensor if isinstance(value, nn.Module) else ()
            shown = [
                (key, x)
                for key, x in attributes.items()
                if isinstance(x, _DENSITIES)
                or (
                    not key.startswith("_")
                    and (isinstance(x, followed) or (_is_leaf(x) and not isinstance(x, unused)))
                )
            ]
            self._add(label, [(f".{key}", x) for key, x in shown])
        elif not is_library or isinstance(value, _NAMESPACES):
            for name in (n for base in cls.__mro__ for n in slots_of(base)):
                with suppress(AttributeError):
                    attributes[name] = getattr(value, name)
            self._follow_once_named(label, attributes)
            self._look_at_class(label, cls)

    def _follow_once_named(self, label: str, attributes: Any) -> None:
        for name, entry in list(attributes.items()):
            if isinstance(entry, property):
                entry = entry.fget
            elif isinstance(entry, (staticmethod, classmethod)):
                entry = entry.__func__
            if name in self.names or (self.follows_all and not name.startswith("__")):
                self.pending.append((f"{label}.{name}", entry))
            else:
                self.waiting.setdefault(name, []).append((f"{label}.{name}", entry))

    def _is_library(self, module: Any) -> bool:
        package = _package(module)
        if package in LIBRARIES:
            return True
        file = str(getattr(sys.modules.get(package), "__file__", None))
        is_installed = "site-packages" in file or "dist-packages" in file
        return is_installed and package not in self.own and not self.follows_all

    def _add(self, label: str, entries: list[tuple[str, Any]]) -> None:
        self.pending.extend((label + end, entry) for end, entry in entries)


def _is_leaf(value: Any) -> bool:
    kinds = (Tensor, np.ndarray, *_PLAIN, *_PRINTED)
    return isinstance(value, kinds) or (
        not isinstance(value, type) and hasattr(type(value), "__array__")
    )


def _readable(value: Any) -> Any:
    """Return a leaf as a value whose content a digest reads."""
    if isinstance(value, _PRINTED):
        return repr(value)
    if isinstance(value, (Tensor, *_PLAIN)):
        return value
    array = np.asarray(value)  # data frames and images, too
    return array if array.dtype.kind in "biufc" else [str(array.dtype), array.tolist()]


def _module_of(program: Any) -> Any:
    while isinstance(program, partial):  # of a handler, with the program as its last argument
        callables = [x for x in program.args if callable(x)]
        program = callables[-1] if callables else program.func
    return getattr(program, "__module__", None) or type(program).__module__


def _package(module: Any) -> str:
    return str(module).partition(".")[0]


def _content(code: CodeType, doc: str | None = None) -> list[Any]:
    """Return what code does: its instructions, names and constants, without its docstring."""
    constants = [
        _content(constant) if isinstance(constant, CodeType) else constant
        for constant in code.co_consts
        if doc is None or constant != doc
    ]
    return [code.co_code, code.co_names, code.co_varnames, constants]
