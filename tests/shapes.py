"""Checks the shapes in the annotations of ``pyro_ext``, and nothing else of them."""

import inspect
import typing

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

CHECKED = ("pyro_ext.ops", "pyro_ext.tracing", "pyro_ext.infer.bounds", "pyro_ext.infer.gradients")


def install():
    """Checks every call of functions in these packages that are imported from now on."""
    install_import_hook(CHECKED, "tests.shapes.check")
    usual = jaxtyping.jaxtyped

    def jaxtyped(typechecker):
        decorate = usual(typechecker=typechecker)
        # A call without a shape would take twice its time.
        return lambda x: decorate(x) if any(map(has_shape, hints_of(x))) else x

    jaxtyping.jaxtyped = jaxtyped


def check(function):
    """Checks the arguments and results that have a shape; the others check themselves."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if has_shape(hint)
    }
    return beartype(function) if function.__annotations__ else function


def hints_of(x):
    """The annotations of a function or class."""
    return inspect.get_annotations(x).values()


def has_shape(hint):
    """Whether an annotation has a shape somewhere inside."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(has_shape, typing.get_args(hint)))
