"""Priors of the parameters of a module."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_ext._arguments import check_type

_WITH_PARTS = (torch.distributions.Distribution, torch.distributions.Transform)

Prior = TorchDistributionMixin | Callable[[str, Tensor], TorchDistributionMixin]


def prior_of(prior: Prior, name: str, parameter: Tensor) -> TorchDistributionMixin:
    """Return the prior of one parameter, expanded to its shape, in its dtype and on its device.

    :param prior: a distribution, or a function of the name and the parameter that returns one.
    :param name: the parameter's name, for errors.
    :param parameter: the parameter.
    :returns: a distribution whose event shape is the parameter's shape.
    :raises TypeError: if the prior is not a distribution.
    :raises ValueError: if the shapes do not match.
    """
    fn: Any = prior if isinstance(prior, TorchDistributionMixin) else prior(name, parameter)
    where = f"the prior of '{name}'"
    check_type("BayesianModule", where, fn, TorchDistributionMixin, "a Pyro distribution")
    fn = _like(fn, parameter)
    num_batch_dims = parameter.dim() - fn.event_dim
    batch_shape, event_shape = parameter.shape[:num_batch_dims], parameter.shape[num_batch_dims:]
    if num_batch_dims < 0 or event_shape != fn.event_shape or not _expands(fn, batch_shape):
        raise ValueError(
            f"BayesianModule: the prior of '{name}' has batch shape {tuple(fn.batch_shape)} and "
            f"event shape {tuple(fn.event_shape)}. Pass a prior that expands to the parameter's "
            f"shape, {tuple(parameter.shape)}."
        )
    return fn.expand(batch_shape).to_event(num_batch_dims)


def is_fixed(fn: Any) -> bool:
    """Return whether no tensor of a distribution requires a gradient."""
    return not any(x.requires_grad for x in _tensors(fn))


def check_support(fn: TorchDistributionMixin, name: str, parameter: Tensor) -> None:
    """Raise a ValueError unless the parameter's value lies in the support of its prior."""
    support: Any = fn.support
    if support.is_discrete:
        raise ValueError(
            f"BayesianModule: the prior of '{name}' is discrete. Pass a continuous distribution."
        )
    if not bool(support.check(parameter.detach()).all()):
        raise ValueError(
            f"BayesianModule: the support of the prior of '{name}' does not contain the values of "
            "the parameter. Pass a prior with a wider support, or change the values."
        )


def _expands(fn: TorchDistributionMixin, batch_shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(fn.batch_shape, batch_shape) == batch_shape
    except RuntimeError:
        return False


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a distribution, or of a part of one."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, _WITH_PARTS):
        yield from _tensors(list(vars(value).values()))


def _like(value: Any, parameter: Tensor) -> Any:
    """Return a distribution, or a part of one, on the device of a parameter.

    Floating-point tensors also get the parameter's dtype.
    """
    if isinstance(value, Tensor):
        return value.to(parameter) if value.is_floating_point() else value.to(parameter.device)
    if isinstance(value, (tuple, list)):
        return type(value)(_like(part, parameter) for part in value)
    if isinstance(value, _WITH_PARTS):
        moved = copy.copy(value)
        for key, part in vars(value).items():
            setattr(moved, key, _like(part, parameter))
        return moved
    return value
