from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_ext._arguments import check_type
from pyro_ext.ops import accumulation_dtype


class Independent(constraints.independent):
    """A constraint on tensors whose last dims belong together, which may be empty."""

    def check(self, value: Tensor) -> Tensor:
        """Whether each is valid, without the last dims."""
        valid = self.base_constraint.check(value)
        for _ in range(self.reinterpreted_batch_ndims):
            valid = valid.all(-1)
        return valid


def one_of_pair(owner: str, **pair: Any) -> dict[str, Any]:
    """The one of two alternative parameters that is given, by name.

    :param str owner: the distribution, for the message.
    :param pair: the two parameters by name; None if not given.
    :raises ValueError: unless exactly one is given.
    """
    given = {name: value for name, value in pair.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(given) if given else "neither"
        raise ValueError(f"{owner}: expected exactly one of {' and '.join(pair)}, got {found}.")
    return given


def broadcast_components(owner: str, num_dims: int = 1, **tensors: Tensor) -> dict[str, Tensor]:
    """Broadcasts parameters that have their components on the last dim.

    :param str owner: the distribution, for the message.
    :param int num_dims: the smallest number of dims that is expected.
    :param tensors: the parameters by name.
    :returns: the same by name, of one shape.
    :raises ValueError: where a parameter is no tensor, has too few dims or another number of
        components, or where the shapes do not broadcast.
    """
    for name, x in tensors.items():
        dims = "(..., K)" if num_dims == 1 else "(..., 3, K)"
        check_type(owner, name, x, Tensor, f"a tensor of shape {dims}")
        if x.dim() < num_dims:
            found = f"shape {tuple(x.shape)}"
            raise ValueError(f"{owner}: expected {name} to be a tensor of {dims}, got {found}.")
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    K = next(iter(shapes.values()))[-1]
    if K == 0 or any(shape[-1] != K for shape in shapes.values()):
        raise ValueError(
            f"{owner}: expected the same number of components, at least one, got {shapes}."
        )
    try:
        shape = torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        raise ValueError(f"{owner}: expected shapes that broadcast, got {shapes}.") from None
    # The backward of an idle expand costs a copy of the gradient.
    return {name: x if x.shape == shape else x.expand(shape) for name, x in tensors.items()}


def expand_parameters(old: Any, new: Any, batch_shape: Sequence[int], names: Iterable[str]) -> None:
    """Sets a distribution up for a larger batch shape, with parameters that share memory.

    :param old: the distribution.
    :param new: the one to be set up.
    :param batch_shape: its batch shape.
    :param names: the parameters to be expanded.
    """
    batch_shape = torch.Size(batch_shape)
    for name in names:
        x = getattr(old, name)
        setattr(new, name, x.expand(batch_shape + x.shape[len(old.batch_shape) :]))
    TorchDistribution.__init__(new, batch_shape, old.event_shape, validate_args=False)
    new._validate_args = old._validate_args


def draw_components(weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Indices of components, drawn with normalised weights.

    :param torch.Tensor weights: of shape ``(..., K)``.
    :param shape: of the draws, which ends in the batch shape of ``weights``.
    :returns: a tensor of ``shape`` with a last dim of size one.
    """
    wide = accumulation_dtype(weights.device)
    below = weights.to(wide).cumsum(-1)[..., :-1]
    uniform = torch.rand((*shape, 1), dtype=wide, device=weights.device)
    return (uniform >= below).sum(-1, keepdim=True)
