"""Supports that move: where the density of a draw ends at a bound that is not fixed."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.distributions import AffineTransform, constraints


def check_fixed_support(name: str, fn: Any) -> None:
    """Raises if the support of a guide site depends on parameters or on earlier draws.

    Integration by parts, on which the rules for leaves rest, leaves a boundary term there.

    :param str name: the site.
    :param fn: its distribution, made with gradients on.
    :raises ValueError: if it does.
    """
    if _moves(fn):
        raise ValueError(
            f"Guide site '{name}' has a support that moves with a parameter or an earlier draw "
            f"({type(_innermost(fn)).__name__}): expected a fixed one for gradient='dreg' and "
            "'stl', which are biased where a density ends at a moving bound; use "
            "gradient='pathwise'."
        )


def _moves(fn: Any) -> bool:
    if _has_gradient(_bounds(fn)):
        return True
    base = getattr(fn, "base_dist", None)
    return base is not None and (_moves(base) or _slides(base, getattr(fn, "transforms", ())))


def _slides(base: Any, transforms: Sequence[Any]) -> bool:
    """Whether learnt affine maps carry a bound of the base along; 0 stays 0 under a scale."""
    if not all(isinstance(transform, AffineTransform) for transform in transforms):
        return False
    bounds = _bounds(base)
    by_loc = bounds and _has_gradient(transform.loc for transform in transforms)
    by_scale = _has_gradient(transform.scale for transform in transforms) and any(
        isinstance(bound, Tensor) or bound != 0 for bound in bounds
    )
    return bool(by_loc or by_scale)


def _bounds(fn: Any) -> list[Any]:
    constraint = fn.support
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    names = ("lower_bound", "upper_bound")
    return [getattr(constraint, name) for name in names if hasattr(constraint, name)]


def _has_gradient(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
