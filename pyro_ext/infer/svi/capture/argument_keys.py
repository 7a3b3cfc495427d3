"""Keys of arguments: arguments with equal keys can share a graph."""

import enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ext.infer.svi.capture.graph_inputs import layout
from pyro_ext.infer.svi.capture.lifted_floats import FLOATS

#: Types whose objects never change, and are compared by value.
_VALUES = (bool, int, float, complex, str, bytes, type(None), range, frozenset, enum.Enum)
_VALUES_OF_LIBRARIES = (np.generic, np.dtype, torch.dtype, torch.device, torch.Size)
_SETTINGS = (bool, int, float, str, type(None))
_MAX_ARRAY = 10_000


def describe_leaf(leaf: Any, lifts: bool) -> Any:
    """Return a hashable key of an argument.

    Tensors have equal keys if they have the same layout. Plain values, slices and arrays must be
    equal. All other objects must be the same.

    :param leaf: the argument.
    :param lifts: whether floats are inputs of graphs, so that their values do not matter.
    """
    if isinstance(leaf, Tensor):
        return layout(leaf) if leaf.layout == torch.strided else (leaf.layout, leaf.shape)
    if type(leaf) in FLOATS and lifts:
        return float
    if isinstance(leaf, slice):
        return slice, *(describe_leaf(x, False) for x in (leaf.start, leaf.stop, leaf.step))
    if type(leaf) is np.ndarray and leaf.dtype.kind in "biufc" and leaf.size <= _MAX_ARRAY:
        return leaf.dtype, leaf.shape, leaf.tobytes()
    if isinstance(leaf, (*_VALUES, *_VALUES_OF_LIBRARIES)):
        try:
            hash(leaf)
        except TypeError:
            return SameObject(leaf)
        return type(leaf), repr(leaf) if leaf != leaf else leaf
    return SameObject(leaf)


def describe_handler(handler: Any) -> Any:
    """Return a hashable key of an effect handler around a step.

    A handler of Pyro may be made anew for each step, if its settings are plain values.
    """
    settings = vars(handler)
    is_of_pyro = type(handler).__module__.startswith("pyro.")
    if is_of_pyro and all(isinstance(x, _SETTINGS) for x in settings.values()):
        return type(handler), *settings.items()
    return SameObject(handler)


class SameObject:
    """A key that compares an object by identity, and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameObject) and self.value is other.value
