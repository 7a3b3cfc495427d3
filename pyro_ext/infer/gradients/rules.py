"""Gradient rules: how the gradient of a bound is estimated from one trace of particles.

With f the bound, f_k and f_kk its derivatives in log w_k, and z_k a reparameterised draw of the
guide, the gradient in the guide's parameters is the expectation of

    sum_k f_k (d log w_k / d z_k) (d z_k / d phi)  -  sum_k f_k (d log q(z_k) / d phi at fixed z_k).

The second sum is again reparameterised: as z_k enters f_k through log w_k alone,

    E f_k (d log q(z_k) / d phi)  =  E f_kk (d log w_k / d z_k) (d z_k / d phi),

so that f_k - f_kk on the path does for both. For the importance-weighted bound that is the squared
normalised weight of Tucker et al. (2019); the identity holds for every smooth f of independent
particles, the jackknife included, where the support of q does not depend on phi.

Where a draw's log q enters log w with a factor c (a mask or a scale), so does the second sum. A
non-reparameterised site d with log-probability s adds signal_k s, differentiated also through the
draws before it; its expectation given z_k moves with z_k, which adds f_k ds/dz_k to the right
side of the identity.

With a local plate, the draws outside of it are made once, and the objective is linear in their log
ratio. For the bound inside, they are parameters; the identity holds for any parameter, but it
makes the estimate noisy at the posterior, where the pathwise derivative in such a draw is zero.
So a draw outside gets the total pathwise derivative, f_k through log w_k, and f_k - f_kk acts
from the draws inside into the guide's parameters only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.gather import score_sites
from pyro_ext.tracing.leaves import Draw
from pyro_ext.tracing.particles import Particles


class Bound(Protocol):
    """What a rule needs of an estimator."""

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """The function f of the log weights."""

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Its first and pure second derivatives."""

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """What each particle's non-reparameterised sites are rewarded by."""

    @property
    def guide_bound(self) -> "Bound":
        """The bound that the guide is trained on: itself for most."""


class GradientRule(NamedTuple):
    """A gradient estimator, for any bound: the contract for a rule of your own.

    An estimate maps a bound and the particles to a scalar tensor. Its value is the bound, scaled,
    summed over the common plates, with the outer terms added. Its gradient is that of the rule. It
    reads the log weights and densities of :class:`Particles` and the derivatives of the bound,
    looks at no value, and is additive over particles if the bound is linear.

    :ivar name: the name of the rule, for errors.
    :ivar estimate: the function.
    :ivar has_leaves: whether leaves take the place of reparameterised draws; they are then in
        ``particles.draws``.
    """

    name: str
    estimate: Callable[[Bound, Particles], Tensor]
    has_leaves: bool

    def needs_leaves(self, bound: Bound) -> bool:
        """Whether leaves are needed for a bound: also where the guide has a bound of its own."""
        return self.has_leaves or bound.guide_bound is not bound

    def objective(self, bound: Bound, particles: Particles) -> Float[Tensor, ""]:
        """The estimate.

        :raises ValueError: if the rule needs reparameterised sites, and there are only others.
        """
        names = [site["name"] for site, _ in score_sites(particles.guide_traces[0])]
        if self.has_leaves and names and not particles.global_draws + particles.draws:
            raise ValueError(
                f"gradient={self.name!r} expects a reparameterised site with parameters in "
                f"the guide, got only {names}, which are not: use gradient='pathwise'."
            )
        return self.estimate(bound, particles)


def pathwise_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    r"""The bound itself, whose gradient for fixed noise is :math:`\sum_k f_k \nabla \log w_k`.

    Source: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 14.
    """
    if bound.guide_bound is bound:
        value = _total(particles, bound_value(bound, particles.log_w)) + particles.outer
        return value + _without_value(_reward(bound, particles))
    return _once_reparameterized(bound, particles, particles.log_q, particles.outer)


def sticking_the_landing_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    """Drops the guide's explicit term of its reparameterised draws.

    The dropped term has mean zero for a linear bound, as at K = 1; else the rule is biased.

    Source: Roeder, Wu and Duvenaud (2017), Sticking the Landing: Simple, Lower-Variance Gradient
    Estimators for Variational Inference.
    """
    return _once_reparameterized(bound, particles, particles.log_q_rest, particles.outer_rest)


def doubly_reparameterized_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    """Turns the guide's explicit term into a path derivative: f_k - f_kk in place of f_k.

    Source: Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators for
    Monte Carlo Objectives.
    """
    first, second = bound.guide_bound.derivatives(particles.log_w.detach())
    replaced = _weighted(particles, second) + _score_weighted(particles, first)
    along_paths = _weighted(particles, first) + particles.outer + _reward(bound, particles)
    global_draws, draws = particles.global_draws, particles.draws
    factors = [_density_factor(draw, particles.scale) for draw in draws]
    if not global_draws and all(factor is None for factor in factors):
        gradients = _leaf_gradients(draws, along_paths - replaced)
    else:
        gradients = _leaf_gradients(global_draws + draws, along_paths)
        explicit = _leaf_gradients(draws, replaced)
        for i, (factor, gradient) in enumerate(zip(factors, explicit, strict=True)):
            i += len(global_draws)
            gradients[i] = gradients[i] - (gradient if factor is None else factor * gradient)
    return _along_paths(
        bound, particles, first, particles.log_q_rest, particles.outer_rest, gradients
    )


GRADIENT_RULES = {
    rule.name: rule
    for rule in (
        GradientRule("pathwise", pathwise_objective, has_leaves=False),
        GradientRule("stl", sticking_the_landing_objective, has_leaves=True),
        GradientRule("dreg", doubly_reparameterized_objective, has_leaves=True),
    )
}


def bound_value(bound: Bound, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
    """The bound, with its shape checked.

    :raises ValueError: if the bound is no tensor of shape ``common``.
    """
    value = bound.bound(log_w)
    if not isinstance(value, Tensor) or value.shape != log_w.shape[1:]:
        found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{type(bound).__name__}.bound: expected a tensor of shape {tuple(log_w.shape[1:])} "
            f"for log weights of shape {tuple(log_w.shape)}, got {found}."
        )
    return value


def _total(particles: Particles, per_plate: Float[Tensor, "*common"]) -> Float[Tensor, ""]:
    return (particles.scale * per_plate).sum()


def _weighted(particles: Particles, weights: Float[Tensor, "K *common"]) -> Float[Tensor, ""]:
    return _total(particles, (weights * _finite(particles.log_w)).sum(0))


def _finite(log_density: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
    """Drops the particles of weight zero, whose coefficients are zero: 0 x inf would be NaN."""
    return log_density.masked_fill(log_density.isinf(), 0.0)


def _score_weighted(
    particles: Particles, weights: Float[Tensor, "K *common"]
) -> Float[Tensor, ""] | float:
    if particles.score is None:
        return 0.0
    return _total(particles, (weights * particles.score).sum(0))


def _reward(bound: Bound, particles: Particles) -> Float[Tensor, ""] | float:
    """The score-function terms; sites outside of the local plate are rewarded by everything."""
    bound, log_w = bound.guide_bound, particles.log_w.detach()
    reward: Tensor | float = 0.0
    if particles.score is not None:
        reward = _score_weighted(particles, bound.learning_signal(log_w))
    if particles.global_scores:
        inside = particles.scale * bound.bound(log_w)
        for score in particles.global_scores:
            everything = particles.reward_outside(inside, score.plates)
            reward = reward + (everything * score.value).sum()
    return reward


def _detached(x: Tensor | float) -> Tensor | float:
    return x.detach() if isinstance(x, Tensor) else x


def _without_value(surrogate: Tensor | float) -> Tensor | float:
    return surrogate - _detached(surrogate)


def _once_reparameterized(bound: Bound, particles: Particles, log_q: Tensor, outer: Any) -> Tensor:
    """The objective with f_k on every path."""
    first, _ = bound.guide_bound.derivatives(particles.log_w.detach())
    along_paths = _weighted(particles, first) + particles.outer + _reward(bound, particles)
    gradients = _leaf_gradients(particles.global_draws + particles.draws, along_paths)
    return _along_paths(bound, particles, first, log_q, outer, gradients)


def _along_paths(
    bound: Bound,
    particles: Particles,
    guide_first: Tensor,
    log_q: Tensor,
    outer: Any,
    gradients: Sequence[Tensor],
) -> Tensor:
    """The objective's value with the gradients of the leaves pushed into the draws.

    The leaves end every path of the explicit terms, which are those of the model and of as much
    of the guide as ``log_q`` and ``outer`` hold.
    """
    first = guide_first
    if bound.guide_bound is not bound:
        first, _ = bound.derivatives(particles.log_w.detach())
    explicit = (first * _finite(particles.log_p) - guide_first * _finite(log_q)).sum(0)
    surrogate = _total(particles, explicit) + outer + _reward(bound, particles)
    draws = particles.global_draws + particles.draws
    for draw, gradient in zip(draws, gradients, strict=True):
        surrogate = surrogate + (gradient * draw.value).sum()
    value = _total(particles, bound_value(bound, particles.log_w.detach()))
    return value + _detached(particles.outer) + _without_value(surrogate)


def _leaf_gradients(draws: Sequence[Draw], objective: Tensor | float) -> list[Tensor]:
    """Total derivatives at the leaves, later draws included."""
    leaves = [draw.leaf for draw in draws]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    if not leaves or not isinstance(objective, Tensor):
        return gradients

    def add(found: Sequence[Tensor | None]) -> None:
        for i, gradient in enumerate(found):
            if gradient is not None:
                gradients[i] = gradients[i] + gradient

    add(torch.autograd.grad(objective, leaves, retain_graph=True, allow_unused=True))
    for i in reversed(range(1, len(draws))):
        upstream = torch.autograd.grad(
            draws[i].value, leaves[:i], gradients[i], retain_graph=True, allow_unused=True
        )
        add(upstream)
    return gradients


def _density_factor(draw: Draw, scale: Any) -> Tensor | None:
    """The factor with which a draw's log q enters log w; None if it is one."""
    factor: Any = draw.mask
    if not isinstance(scale, Tensor):  # else the user's scale is the same everywhere, and outside
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
                f"Guide site '{draw.name}' has a mask inside of other distributions: expected "
                ".mask(...) to be applied last, or poutine.mask, for this gradient rule."
            )
    if factor is None or factor is True:
        return None
    factor = torch.as_tensor(factor, dtype=draw.leaf.dtype, device=draw.leaf.device)
    return factor.reshape(factor.shape + (1,) * draw.fn.event_dim)
