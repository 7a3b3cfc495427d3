"""Gradients along the paths from log p and log q to the draws of the guide.

An objective has the coefficient f_k on log p of particle k, and may have another coefficient c_k on
the paths from there to the draws. If their ratio is one number for each particle, a gate between
the draws and the model multiplies gradients by this number. The backward pass for the parameters of
the model then also yields the gradients at the draws. Otherwise these take a pass of their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.leaves import Draw, last_gates
from pyro_ext.tracing.particles import Particles


def set_ratios(
    particles: Particles, first: Float[Tensor, "K *common"], paths: Float[Tensor, "K *common"]
) -> Tensor | None:
    """Let gradients of log p reach the draws with the coefficients of the paths.

    :param first: the coefficients of log p.
    :param paths: the coefficients of the paths to draws.
    :returns: the coefficients of log p, with tiny numbers instead of zeros where a ratio would be
        infinite; None if the ratio is not one number for each particle.
    """
    if paths is first:
        return first
    draws, points = particles.draws, particles.points
    if (
        particles.global_draws
        or any(draw.model_gate is None for draw in draws + points)
        or any(density_factor(draw, particles.scale) is not None for draw in draws)
    ):
        return None
    gates = {draw.gate for draw in draws}
    before = [last_gates(point.value, gates) for point in points]
    if any(None in found and len(found) > 1 for found in before):
        return None  # its parameters need the coefficient of log p, and its draws that of paths
    of_draws = [point for point, found in zip(points, before, strict=True) if None not in found]
    gated = [draw.model_gate for draw in draws + points]
    if gates & last_gates(particles.log_p, {*gates, *gated}):
        return None  # the model reads a draw other than as the value of its site
    info = torch.finfo(first.dtype)
    # This is far below the rounding errors of the coefficients.
    least = info.eps**2 * paths.abs()
    first = torch.where(first.abs() < least, least, first)
    ratio = paths / torch.where(first.abs() < info.tiny, 1, first)
    for draw in (*draws, *of_draws):
        if draw.model_gate is not None:
            draw.model_gate.factor = particles.along(draw, ratio)
    return first


def take_gates(draws: Sequence[Draw]) -> bool:
    """Take the gates of draws for an objective, and return whether it is the first that does.

    :raises RuntimeError: if an earlier objective has opened the gates, and thus the graph of the
        particles.
    """
    gates = [draw.gate for draw in draws]
    if any(gate.factor is not None for gate in gates):
        raise RuntimeError(
            "An objective has opened the graph of these particles. Trace them anew for another "
            "objective."
        )
    is_first = not any(gate.is_taken for gate in gates)
    for gate in gates:
        gate.is_taken = True
    return is_first


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
    if not leaves or not isinstance(objective, Tensor) or not objective.requires_grad:
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
