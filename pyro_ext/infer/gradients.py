"""Gradient rules: from detached log weights to a surrogate that is linear in each particle."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pyro_ext.infer.particles import Particles

FirstAndSecond = Callable[[Tensor], tuple[Tensor, Tensor]]


class GradientRule(NamedTuple):
    """How the gradient of a bound is estimated from one trace of particles.

    :ivar surrogate: maps a bound's ``first_and_second`` and the particles to a scalar tensor whose
        gradient is that of the bound, scaled and summed over the common plates; its value means
        nothing.
    :ivar leaves: whether reparameterised draws have to be traced as leaves.
    """

    surrogate: Callable[[FirstAndSecond, Particles], Tensor]
    leaves: bool


def pathwise_surrogate(first_and_second: FirstAndSecond, particles: Particles) -> Tensor:
    r"""The exact gradient of the bound for fixed noise: :math:`\sum_k f_k \nabla \log w_k`.

    Source: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 14.
    """
    log_w = particles.log_w
    first, _ = first_and_second(log_w.detach())
    return (particles.scale * (first * log_w).sum(0)).sum()


GRADIENT_RULES = {"pathwise": GradientRule(pathwise_surrogate, leaves=False)}
