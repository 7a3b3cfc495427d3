"""Turns off the code of torch and Pyro that reads the values of tensors."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from pyro.infer.util import Dice
from torch import Tensor
from torch.distributions import Distribution
from torch.overrides import TorchFunctionMode

from pyro_ext._private.of_pyro import COMMON_SCALE

#: One capture at a time, because a capture replaces functions of torch and Pyro for its thread.
LOCK = threading.RLock()


class _WithoutBranches(TorchFunctionMode):
    """A mode in which Pyro's expectation over enumerated sites has fixed shapes.

    Pyro selects the terms with positive probability. Here, the others become zero.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all:
            return False
        if func is Tensor.masked_select:
            x, mask = args
            return torch.where(mask, x, 0.0)
        return func(*args, **(kwargs or {}))


@contextmanager
def without_looking_at_values() -> Iterator[None]:
    """Turn off all code of Pyro that reads values: validation, warnings of NaN, and branches.

    It stays as it is in other threads.
    """
    thread = threading.get_ident()
    initialize, validate = Distribution.__init__, Distribution._validate_sample

    def initialize_unchecked(self: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            # Distributions with validate_args=True ignore the global switch.
            args, kwargs = args[:2], {**kwargs, "validate_args": False}
        initialize(self, *args, **kwargs)

    def accept(self: Any, value: Tensor) -> None:
        if threading.get_ident() != thread:
            validate(self, value)

    expectation = Dice.compute_expectation

    def expectation_without_branches(self: Dice, costs: Any) -> Any:
        with _WithoutBranches():
            return expectation(self, costs)

    with LOCK, ExitStack() as stack:
        stack.enter_context(patch.object(Distribution, "__init__", initialize_unchecked))
        stack.enter_context(patch.object(Distribution, "_validate_sample", accept))
        replaced = _unless_in(thread, expectation, expectation_without_branches)
        stack.enter_context(patch.object(Dice, "compute_expectation", replaced))
        for module, (name, otherwise) in itertools.product(list(sys.modules.values()), _CHECKS):
            original = vars(module).get(name) if isinstance(module, ModuleType) else None
            if callable(original) and original.__module__.startswith("pyro."):
                replaced = _unless_in(thread, original, otherwise)
                stack.enter_context(patch.object(module, name, replaced))
        yield


def _common_scale(scales: Sequence[Any]) -> Any:
    """Return the scale of all enumerated sites. Only the result of the comparison is read."""
    first = scales[0]
    if any(bool(scale != first) for scale in scales if scale is not first):
        raise ValueError("enumerated sites have different scales")
    return first


#: Functions of Pyro that read values, or decide whether to read them, with replacements. A program
#: that enables validation for a block would store the replaced state as the one to return to.
_CHECKS: list[tuple[str, Callable[..., Any]]] = [
    ("enable_validation", lambda is_validate=True: None),
    ("is_validation_enabled", lambda: False),
    ("warn_if_nan", lambda value, *args, **kwargs: value),
    ("warn_if_inf", lambda value, *args, **kwargs: value),
    (COMMON_SCALE, _common_scale),
]


def _unless_in(
    thread: int, function: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that is replaced by another one in one thread."""

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = otherwise if threading.get_ident() == thread else function
        return chosen(*args, **kwargs)

    return call
