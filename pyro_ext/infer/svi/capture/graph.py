"""Turns off the checks that read the values of tensors."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.distributions import Distribution

#: One capture at a time, because a capture replaces functions of torch and Pyro for its thread.
LOCK = threading.RLock()


@contextmanager
def without_looking_at_values() -> Iterator[None]:
    """Turn off all checks that read values: validation, and Pyro's warnings of NaN.

    They stay on in other threads.
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

    with LOCK, ExitStack() as stack:
        stack.enter_context(patch.object(Distribution, "__init__", initialize_unchecked))
        stack.enter_context(patch.object(Distribution, "_validate_sample", accept))
        for module, (name, otherwise) in itertools.product(list(sys.modules.values()), _CHECKS):
            original = vars(module).get(name) if isinstance(module, ModuleType) else None
            if callable(original) and original.__module__.startswith("pyro."):
                replaced = _unless_in(thread, original, otherwise)
                stack.enter_context(patch.object(module, name, replaced))
        yield


#: Functions of Pyro that read values, or decide whether to read them, with replacements.
_CHECKS: list[tuple[str, Callable[..., Any]]] = [
    ("is_validation_enabled", lambda: False),
    ("warn_if_nan", lambda value, *args, **kwargs: value),
    ("warn_if_inf", lambda value, *args, **kwargs: value),
]


def _unless_in(
    thread: int, function: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that is replaced by another one in one thread."""

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = otherwise if threading.get_ident() == thread else function
        return chosen(*args, **kwargs)

    return call
