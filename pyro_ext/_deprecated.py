"""Support for old names, which work for one more release and give a warning."""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Return a decorator that accepts keyword arguments by their old names.

    :param names: the new name of each renamed argument, in the form ``old="new"``.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old, new in names.items():
                if old not in kwargs:
                    continue
                _warn(f"{function.__name__}: {old}= is deprecated. Pass {new}= instead.")
                if new in kwargs:
                    raise TypeError(
                        f"{function.__name__}: {old}= is the old name of {new}=. Pass one of them."
                    )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def keep_old_methods(cls: type, **names: str) -> None:
    """Support the old names of the methods that a class defines.

    A subclass may override a method under its old name, and a user may call it under its old name.

    :param cls: the class.
    :param names: the new name of each renamed method, in the form ``old="new"``.
    """
    for old, new in names.items():
        own = vars(cls)
        if old in own and new not in own:
            _warn(f"{cls.__name__}.{old} is deprecated. Define {new} instead.")
            setattr(cls, new, own[old])
        elif new in own:
            setattr(cls, old, _renamed_method(own[new], f"{cls.__name__}.{old}", new))


def _renamed_method(method: Callable[..., Any], name: str, new: str) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method under its old name."""
        _warn(f"{name} is deprecated. Call {new} instead.")
        return method(self, *args, **kwargs)

    return call


def _warn(message: str) -> None:
    warnings.warn(message, DeprecationWarning, stacklevel=3)
