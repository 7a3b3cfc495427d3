"""Gradients along the paths from log p and log q to the draws of the guide.

An objective has the coefficient f_k on log p of particle k, and may have another coefficient c_k on
the paths from there to the draws. If their ratio is one number for each particle, a gate between
the draws and the model multiplies gradients by this number. The backward pass for the parameters of
the model then also yields the gradients at the draws. Otherwise these take a pass of their own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.leaves import Draw, origins
from pyro_ext.tracing.particles import Particles


class Coefficients(NamedTuple):
    """The coefficients of an objective, each of shape ``(K, *common)``.

    :ivar model: the coefficients of log p.
    :ivar guide: the coefficients of log q, and of the paths to the parameters of points.
    :ivar paths: the coefficients of the paths to draws.
    """

    model: Float[Tensor, "K *common"]
    guide: Float[Tensor, "K *common"]
    paths: Float[Tensor, "K *common"]


def set_ratios(particles: Particles, coefficients: Coefficients) -> Tensor | None:
    """Let gradients of log p reach the draws with the coefficients of the paths.

    :returns: the coefficients of log p, with tiny numbers instead of zeros where a ratio would be
        infinite; None if the ratio is not one number for each particle.
    """
    model, guide, paths = coefficients
    if model is guide is paths:
        return model
    draws = particles.draws + particles.points
    if particles.global_draws or any(draw.model_gate is None for draw in draws):
        return None
    of_draws = [paths] * len(draws)
    if paths is not guide:
        drawn = [draw for draw in particles.draws if not draw.is_point]
        if any(density_factor(draw, particles.scale) is not None for draw in drawn):
            return None
        leaves = [draw.leaf for draw in drawn]
        kinds = [origins(draw.value, leaves) if draw.is_point else {"leaf"} for draw in draws]
        if {"leaf", "parameter"} in kinds:
            return None
        of_draws = [paths if "leaf" in kind else guide for kind in kinds]
    info = torch.finfo(model.dtype)
    # This is far below the rounding errors of the coefficients.
    least = info.eps**2 * torch.maximum(paths.abs(), guide.abs())
    model = torch.where(model.abs() < least, least, model)
    divisor = torch.where(model.abs() < info.tiny, 1, model)
    for draw, coefficient in zip(draws, of_draws, strict=True):
        if draw.model_gate is not None:
            draw.model_gate.factor = particles.along(draw, coefficient / divisor)
    return model


def leaf_gradients(draws: Sequence[Draw], objective: Tensor | float) -> list[Tensor]:
    """Return the total derivatives at the leaves, including those through later draws."""
    leaves = [draw.leaf for draw in draws]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]

    def add(found: Sequence[Tensor | None]) -> None:
        for i, gradient in enumerate(found):
            if gradient is not None:
                gradients[i] = gradients[i] + gradient

    add(partial_derivatives(objective, leaves))
    for i in reversed(range(1, len(draws))):
        upstream = torch.autograd.grad(
            draws[i].value, leaves[:i], gradients[i], retain_graph=True, allow_unused=True
        )
        add(upstream)
    return gradients


def partial_derivatives(
    objective: Tensor | float, leaves: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the derivatives at leaves whose gates are closed, so that no other leaf is between."""
    if not leaves or not isinstance(objective, Tensor):
        return [None] * len(leaves)
    return torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True)


def density_factor(draw: Draw, scale: Any) -> Tensor | None:
    """Return the factor of a draw's log q in log w; None if it is 1."""
    if draw.is_point:  # has no explicit term
        return torch.zeros_like(draw.leaf)
    factor: Any = draw.mask
    if not isinstance(scale, Tensor):  # a tensor scale is the same at every site and stays outside
        relative = draw.scale / scale
        if isinstance(relative, Tensor) or not math.isclose(relative, 1):
            factor = relative if factor is None else relative * factor
    fn = draw.fn
    if (mask := mask_of(fn)) is not None:
        factor = mask if factor is None else mask * factor
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
        if mask_of(fn) is not None:
            raise NotImplementedError(
                f"Guide site '{draw.name}' has a mask inside another distribution, which this "
                "gradient rule does not support. Apply .mask(...) last, or use poutine.mask."
            )
    if factor is None or factor is True:
        return None
    factor = torch.as_tensor(factor, dtype=draw.leaf.dtype, device=draw.leaf.device)
    return factor.reshape(factor.shape + (1,) * draw.fn.event_dim)
