import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ext._arguments import check_type
from pyro_ext.ops import accumulation_dtype


class Independent(constraints.independent):
    """A constraint that treats the last dims, which may be empty, as one value."""

    def check(self, value: Tensor) -> Tensor:
        """Return whether each value is valid, without the last dims."""
        valid = self.base_constraint.check(value)
        for _ in range(self.reinterpreted_batch_ndims):
            valid = valid.all(-1)
        return valid

    def __repr__(self) -> str:
        return f"Independent({self.base_constraint!r}, {self.reinterpreted_batch_ndims})"


class _Finite(constraints.Constraint):
    """Real numbers without the infinities, which ``constraints.real`` includes."""

    def check(self, value: Tensor) -> Tensor:
        """Return whether each value is valid."""
        return value.abs() < math.inf


class _FinitePositive(constraints.Constraint):
    def check(self, value: Tensor) -> Tensor:
        """Return whether each value is valid."""
        return (value > 0) & (value < math.inf)


class _LogWeights(constraints.Constraint):
    """Vectors of log weights. Some may be minus infinity, but not all."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return whether each vector is valid."""
        return value.amax(-1).isfinite()


finite = _Finite()
finite_positive = _FinitePositive()
log_weights = _LogWeights()


def one_of_pair(owner: str, **pair: Any) -> dict[str, Any]:
    """Return the one of two alternative parameters that was given.

    :param owner: the name of the distribution, for errors.
    :param pair: a dict from the names of the two parameters to their values; None for a value that
        is not given.
    :returns: a dict with one entry.
    :raises ValueError: unless exactly one is given.
    """
    given = {name: value for name, value in pair.items() if value is not None}
    if len(given) != 1:
        found = "both are" if given else "neither is"
        raise ValueError(
            f"{owner}: exactly one of {' and '.join(pair)} must be given, but {found}."
        )
    return given


def broadcast_components(owner: str, num_dims: int = 1, **tensors: Tensor) -> dict[str, Tensor]:
    """Broadcast parameters that have their components on the last dim.

    :param owner: the name of the distribution, for errors.
    :param num_dims: the smallest number of dims of a parameter.
    :param tensors: a dict from name to parameter.
    :returns: a dict from name to broadcast parameter, all of one shape.
    :raises TypeError: if a parameter is not a tensor.
    :raises ValueError: if a parameter has too few dims or another number of components, or if the
        shapes do not broadcast.
    """
    for name, x in tensors.items():
        dims = "(..., K)" if num_dims == 1 else "(..., 3, K)"
        check_type(owner, name, x, Tensor, f"a tensor of shape {dims}")
        if x.dim() < num_dims:
            raise ValueError(
                f"{owner}: {name} must be a tensor of shape {dims}, but its shape is "
                f"{tuple(x.shape)}."
            )
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    K = next(iter(shapes.values()))[-1]
    if K == 0 or any(shape[-1] != K for shape in shapes.values()):
        raise ValueError(
            f"{owner}: the parameters must have the same number of components, at least one, in "
            f"their last dim, but their shapes are {shapes}."
        )
    try:
        shape = torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(
            f"{owner}: the shapes of the parameters do not broadcast: {shapes}."
        ) from None
    # The backward pass of an unnecessary expand costs a copy of the gradient.
    return {name: x if x.shape == shape else x.expand(shape) for name, x in tensors.items()}


def expand_parameters(old: Any, new: Any, batch_shape: Sequence[int], names: Iterable[str]) -> None:
    """Set up a distribution with a larger batch shape, and with parameters that share memory.

    :param old: the distribution to expand.
    :param new: the distribution to set up.
    :param batch_shape: the batch shape of ``new``.
    :param names: the names of the parameters to expand.
    """
    batch_shape = torch.Size(batch_shape)
    for name in names:
        x = getattr(old, name)
        setattr(new, name, x.expand(batch_shape + x.shape[len(old.batch_shape) :]))
    TorchDistribution.__init__(new, batch_shape, old.event_shape, validate_args=False)
    new._validate_args = old._validate_args


def draw_components(weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Draw indices of components with normalised weights.

    :param weights: the weights, of shape ``(..., K)``.
    :param shape: the shape of the draws. It ends in the batch shape of ``weights``.
    :returns: a tensor of ``shape`` with an additional last dim of size one.
    """
    wide = accumulation_dtype(weights.device)
    below = weights.to(wide).cumsum(-1)[..., :-1]
    uniform = torch.rand((*shape, 1), dtype=wide, device=weights.device)
    return (uniform >= below).sum(-1, keepdim=True)
