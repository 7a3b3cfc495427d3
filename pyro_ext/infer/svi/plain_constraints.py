"""Constraints as plain values, which a file can hold."""

from typing import Any

import pyro.distributions.constraints
import torch.distributions.constraints
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ext._digest import digest
from pyro_ext._files import to_plain

_LIBRARIES = {
    module.__name__: module
    for module in (torch.distributions.constraints, pyro.distributions.constraints)
}


def encode(constraint: Constraint) -> dict[str, Any]:
    """Return a constraint as plain values.

    A constraint of torch or Pyro becomes its class and attributes. Of any other constraint, only
    the name of the class is kept.
    """
    cls = type(constraint)
    if _class_of(cls.__module__, cls.__qualname__) is cls:
        try:
            attributes = {key: _encoded(value) for key, value in vars(constraint).items()}
            plain = to_plain(attributes, "constraint")
        except TypeError:  # it contains a constraint or an object of a user's own
            pass
        else:
            return {"library": cls.__module__, "name": cls.__qualname__, "attributes": plain}
    return {"library": None, "name": cls.__qualname__}


def decode(encoded: dict[str, Any]) -> Constraint | None:
    """Return the constraint that was encoded, or None if it is not one of torch or Pyro."""
    cls = _class_of(encoded["library"], encoded["name"])
    if cls is None:
        return None
    constraint: Constraint = cls.__new__(cls)
    vars(constraint).update({key: _decoded(value) for key, value in encoded["attributes"].items()})
    return constraint


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two encoded constraints are equal. Numbers may have other types."""
    return digest(_with_floats(a)) == digest(_with_floats(b))


def describe_constraint(encoded: dict[str, Any]) -> str:
    """Return a constraint as text, for an error message."""
    constraint = decode(encoded)
    return str(encoded["name"]) if constraint is None else repr(constraint)


def _class_of(library: str | None, name: str) -> Any:
    cls = getattr(_LIBRARIES.get(str(library)), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, Constraint) else None


def _encoded(value: Any) -> Any:
    if isinstance(value, Constraint):
        encoded = encode(value)
        if encoded["library"] is None:
            raise TypeError(f"{encoded['name']} is not a constraint of torch or Pyro.")
        return {"constraint": encoded}
    return [_encoded(x) for x in value] if isinstance(value, (list, tuple)) else value


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_floats(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_floats(x) for x in value]
    is_scalar = isinstance(value, Tensor) and value.dim() == 0
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_scalar or is_number else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return decode(value["constraint"])
    return [_decoded(x) for x in value] if isinstance(value, (list, tuple)) else value
