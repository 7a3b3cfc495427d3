"""Gradient rules: how the gradient of a bound is estimated from one trace of particles."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from pyro_ext.infer.particles import Particles


class Bound(Protocol):
    """What a rule needs of an estimator."""

    def bound(self, log_w: Tensor) -> Tensor:
        """The function f of the log weights."""

    def first_and_second(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Its first and pure second derivatives."""


class GradientRule(NamedTuple):
    """A gradient estimator, for any bound.

    :ivar objective: maps a bound and the particles to a scalar tensor with the value of the bound,
        scaled and summed over the common plates, and with the gradient of the rule.
    :ivar leaves: whether reparameterised draws have to be traced as leaves.
    """

    objective: Callable[[Bound, Particles], Tensor]
    leaves: bool


def pathwise_objective(bound: Bound, particles: Particles) -> Tensor:
    r"""The bound itself, whose gradient for fixed noise is :math:`\sum_k f_k \nabla \log w_k`.

    Source: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 14.
    """
    return (particles.scale * bound.bound(particles.log_w)).sum()


GRADIENT_RULES = {"pathwise": GradientRule(pathwise_objective, leaves=False)}
