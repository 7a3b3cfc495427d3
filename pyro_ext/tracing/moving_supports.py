"""Guide sites whose support has a bound that depends on a parameter."""

import math
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from pyro.distributions import TransformedDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import (
    AbsTransform,
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    PowerTransform,
    Transform,
)

from pyro_ext._private.of_torch import InverseTransform


class _End(Enum):
    """The place of a bound of a support: zero, another fixed place, or a place that moves."""

    ZERO = 0
    FIXED = 1
    MOVES = 2


def support_moves(fn: Any) -> bool:
    """Return whether a bound of the support depends on parameters or on earlier draws.

    Doubly reparameterised gradients rest on integration by parts. At a moving bound, a boundary
    term remains unless the density vanishes there.

    :param fn: a distribution, created with gradients enabled.
    """
    return _End.MOVES in _ends(fn)


def _ends(fn: Any) -> list[_End]:
    if hasattr(fn, "component0"):  # MaskedMixture
        return _ends(fn.component0) + _ends(fn.component1)
    base = getattr(fn, "base_dist", None)
    if base is not None and not hasattr(fn, "transforms"):
        return _ends(base)
    # The support of this class is only a codomain. Subclasses, such as Gumbel, define their own.
    if type(fn) in (TransformedDistribution, torch.distributions.TransformedDistribution):
        ends = _ends(base)
        for transform in _flattened(fn.transforms):
            ends = [image for end in ends if (image := _image(end, transform)) is not None]
        return ends
    try:
        constraint = fn.support
    except NotImplementedError:
        return []
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    bounds = (getattr(constraint, name, math.inf) for name in ("lower_bound", "upper_bound"))
    return [_end_at(bound) for bound in bounds if isinstance(bound, Tensor) or math.isfinite(bound)]


def _end_at(bound: Any) -> _End:
    if isinstance(bound, Tensor):
        return _End.MOVES if bound.requires_grad else _End.FIXED
    return _End.FIXED if bound else _End.ZERO


def _flattened(transforms: Iterable[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flattened(transform.parts)
        elif isinstance(transform, IndependentTransform):
            yield from _flattened([transform.base_transform])
        else:
            yield transform


def _image(end: _End, transform: Transform) -> _End | None:
    """Return the place to which a transform moves a bound; None if it is infinite."""
    is_inverse = isinstance(transform, InverseTransform)
    if is_inverse:
        transform = transform.inv
    if end is _End.ZERO:
        if isinstance(transform, ExpTransform) and is_inverse:
            return None
        if isinstance(transform, AbsTransform | PowerTransform):
            return end
        # An affine transform maps 0 to its location. Its inverse maps 0 to 0 if the location is 0.
        if isinstance(transform, AffineTransform):
            image = _end_at(transform.loc)
            if image is _End.ZERO or not is_inverse:
                return image
    return _End.MOVES if end is _End.MOVES or _is_learnt(transform) else _End.FIXED


def _is_learnt(transform: Transform) -> bool:
    tensors: list[Any] = list(vars(transform).values())
    if isinstance(transform, nn.Module):
        tensors += transform.parameters()
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
