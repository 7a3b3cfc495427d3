"""Gradient rules: estimators of the gradient of a bound, from one trace of particles.

Let f be the bound, with derivatives f_k and f_kk in log w_k. Let z_k be a reparameterised draw of
the guide. The gradient in the guide's parameters phi is the expectation of

    sum_k f_k (d log w_k / d z_k) (d z_k / d phi)  -  sum_k f_k (d log q(z_k) / d phi at fixed z_k).

The first sum is called the path term, and the second the explicit term. The explicit term can be
reparameterised again. Because z_k enters f_k only through log w_k,

    E f_k (d log q(z_k) / d phi)  =  E f_kk (d log w_k / d z_k) (d z_k / d phi),

so the coefficient f_k - f_kk on the path covers both sums. For the importance-weighted bound, this
coefficient is the squared normalised weight of Tucker et al. (2019). The identity holds for every
smooth f of independent particles, including the jackknife, if the support of q does not depend on
phi.

If a mask or a scale multiplies a draw's log q in log w by a factor c, it also multiplies the
explicit term by c. A non-reparameterised site with log-probability s adds the term signal_k s,
where signal_k is the learning signal of particle k. This term is also differentiated through the
draws before the site. Its expectation given z_k depends on z_k, which adds f_k ds/dz_k to the right
side of the identity.

If the bound is linear, f_k is a constant, so f_k s and its derivatives have mean zero and are left
out. The learning signal of a site in plates then is that of the log weights summed over all other
plates: a term in another element of its plates does not depend on the site. This is not so if a
guide site outside of a plate depends on draws inside of it. The signal is not split in this case.

With a local plate, the draws outside of it are made once, and the objective is linear in their log
ratio. For the bound inside the plate, these draws are parameters. The identity holds for any
parameter, but for these draws it makes the estimate noisy at the posterior, where their pathwise
derivative is zero. Therefore a draw outside the plate gets the total pathwise derivative, with the
coefficient f_k of log w_k. The coefficient f_k - f_kk is used only on paths from the draws inside
the plate to the guide's parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float
from torch import Tensor

from pyro_ext._arguments import abbreviate, describe
from pyro_ext.infer.gradients.paths import (
    density_factor,
    leaf_gradients,
    partial_derivatives,
    set_ratios,
    take_gates,
)
from pyro_ext.tracing.leaves import Leaves
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.rewards import score_sites


class Bound(Protocol):
    """The members of an estimator that a gradient rule uses."""

    def bound(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
        """Return the function f of the log weights."""

    def derivatives(
        self, log_w: Float[Tensor, "K *common"]
    ) -> tuple[Float[Tensor, "K *common"], Float[Tensor, "K *common"]]:
        """Return the first and pure second derivatives of f."""

    def learning_signal(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the learning signal: the reward of each particle's non-reparameterised sites."""

    def model_weights(self, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
        """Return the weights of the model's gradient if the guide has a bound of its own."""

    @property
    def guide_bound(self) -> "Bound":
        """The bound that trains the guide; usually this bound itself."""

    @property
    def gradient_bound(self) -> "Bound":
        """The bound that trains model and guide; usually this bound itself."""


class GradientRule(NamedTuple):
    """A gradient estimator for any bound, and the contract for a rule of your own.

    An estimate maps a bound and the particles to a scalar tensor. The value of this tensor is the
    scaled bound, summed over the common plates, plus the outer terms. The gradient of the tensor is
    the gradient estimate of the rule.

    The estimate uses the log weights and densities of :class:`Particles` and the derivatives of the
    bound. It does not read tensor values into Python, so that it can be captured as a graph. If the
    bound is linear, the estimate is a sum of terms for each particle.

    :ivar name: the name of the rule, for error messages.
    :ivar estimate: the function that computes the estimate.
    :ivar has_leaves: whether leaves replace the reparameterised draws everywhere. A leaf is an
        autograd leaf with the value of the draw. If leaves are used, ``particles.draws`` and
        ``particles.global_draws`` hold the draws with their leaves.
    """

    name: str
    estimate: Callable[[Bound, Particles], Tensor]
    has_leaves: bool

    def leaves(self, bound: Bound) -> Leaves:
        """Return the places where the rule needs leaves for a bound.

        Every rule needs them in the model if the guide has a bound of its own.
        """
        bound = bound.gradient_bound
        if bound.guide_bound is bound:
            return Leaves.EVERYWHERE if self.has_leaves else Leaves.NOWHERE
        # The guide's parameters also reach the model through points.
        return Leaves.EVERYWHERE_WITH_POINTS if self.has_leaves else Leaves.IN_MODEL

    def objective(self, bound: Bound, particles: Particles) -> Float[Tensor, ""]:
        """Return the estimate of the rule for a bound.

        :param bound: the bound.
        :param particles: the particles, with the leaves that :meth:`leaves` asks for.
        :raises ValueError: if the rule needs reparameterised sites and the guide has only other
            sites.
        :raises RuntimeError: if an objective of the same particles has opened their graph.
        """
        names = [site["name"] for site, _ in score_sites(particles.guide_traces[0])]
        draws = particles.global_draws + particles.draws
        if self.has_leaves and (rejected := {draw.name for draw in draws}.intersection(names)):
            raise ValueError(
                f"Guide site '{min(rejected)}' is drawn by rejection, so its noise depends on "
                f"parameters. gradient={self.name!r} would be biased. Use gradient='pathwise'."
            )
        if self.has_leaves and names and all(draw.is_point for draw in draws):
            raise ValueError(
                f"gradient={self.name!r} needs a reparameterised site with parameters in the "
                f"guide, but its sites {abbreviate(names)} are not reparameterised. Use "
                "gradient='pathwise', which takes a score-function gradient for such sites."
            )
        estimate = self.estimate(bound.gradient_bound, particles)
        if bound.gradient_bound is bound:
            return estimate
        return _value(bound, particles) + _without_value(estimate)


def pathwise_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    r"""Return the bound itself.

    Its gradient for fixed noise is :math:`\sum_k f_k \nabla \log w_k`.

    Source: Burda, Grosse and Salakhutdinov (2016), Importance Weighted Autoencoders, equation 14.
    """
    if bound.guide_bound is bound:
        value = _total(particles, bound_value(bound, particles.log_w)) + particles.outer
        return value + _without_value(_reward(bound, particles))
    first, _ = bound.guide_bound.derivatives(particles.log_w.detach())
    return _in_two_passes(bound, particles, first, first, particles.log_q, particles.outer)


def sticking_the_landing_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    """Return the objective without the explicit term of the reparameterised draws.

    The dropped term has mean zero for a linear bound, as with K = 1. For other bounds the rule is
    biased.

    Source: Roeder, Wu and Duvenaud (2017), Sticking the Landing: Simple, Lower-Variance Gradient
    Estimators for Variational Inference.
    """
    first, _ = bound.guide_bound.derivatives(particles.log_w.detach())
    return _with_paths(bound, particles, first, first)


def doubly_reparameterized_objective(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    """Return the objective with the explicit term turned into a path term.

    The coefficient of the path is then f_k - f_kk instead of f_k.

    Source: Tucker, Lawson, Gu and Maddison (2019), Doubly Reparameterized Gradient Estimators for
    Monte Carlo Objectives.
    """
    first, second = bound.guide_bound.derivatives(particles.log_w.detach())
    score = _score_weighted(particles, first)
    return _with_paths(bound, particles, first, first - second, score)


GRADIENT_RULES = {
    rule.name: rule
    for rule in (
        GradientRule("pathwise", pathwise_objective, has_leaves=False),
        GradientRule("stl", sticking_the_landing_objective, has_leaves=True),
        GradientRule("dreg", doubly_reparameterized_objective, has_leaves=True),
    )
}


def bound_value(bound: Bound, log_w: Float[Tensor, "K *common"]) -> Float[Tensor, "*common"]:
    """Return the value of a bound, after a check of its shape.

    :raises ValueError: if it is not a tensor of shape ``common``.
    """
    value = bound.bound(log_w)
    if not isinstance(value, Tensor) or value.shape != log_w.shape[1:]:
        raise ValueError(
            f"{type(bound).__name__}.bound must return a tensor of shape {tuple(log_w.shape[1:])} "
            f"for log weights of shape {tuple(log_w.shape)}, but it returned {describe(value)}."
        )
    return value


def _total(particles: Particles, per_plate: Float[Tensor, "*common"]) -> Float[Tensor, ""]:
    return (particles.scale * per_plate).sum()


def _weighted(particles: Particles, weights: Float[Tensor, "K *common"]) -> Float[Tensor, ""]:
    return _total(particles, (weights * _finite(particles.log_w)).sum(0))


def _finite(log_density: Float[Tensor, "K *common"]) -> Float[Tensor, "K *common"]:
    """Replace infinite log densities by 0.

    They belong to particles of weight zero, whose coefficient is zero, and 0 x inf would be NaN.
    """
    return log_density.masked_fill(log_density.isinf(), 0.0)


def _score_weighted(
    particles: Particles, weights: Float[Tensor, "K *common"]
) -> Float[Tensor, ""] | float:
    if particles.score is None or particles.split_scores is not None:
        return 0.0
    return _total(particles, (weights * particles.score).sum(0))


def _reward(bound: Bound, particles: Particles) -> Float[Tensor, ""] | float:
    """Return the score-function terms.

    The reward of a site outside the local plate is the whole objective.
    """
    bound = bound.guide_bound
    reward: Tensor | float = 0.0
    if particles.split_scores is not None:
        for score in particles.split_scores:
            reward = reward + (bound.learning_signal(score.log_w.detach()) * score.log_q).sum()
    elif particles.score is not None:
        reward = _score_weighted(particles, bound.learning_signal(particles.log_w.detach()))
    if particles.global_scores:
        inside = particles.scale * bound.bound(particles.log_w.detach())
        for term in particles.global_scores:
            everything = particles.reward_outside(inside, term.plates)
            reward = reward + (everything * term.value).sum()
    return reward


def _value(bound: Bound, particles: Particles) -> Float[Tensor, ""]:
    """Return the scaled bound with the outer terms, without a gradient."""
    value = _total(particles, bound_value(bound, particles.log_w.detach()))
    return value + _detached(particles.outer)


def _detached(x: Tensor | float) -> Tensor | float:
    return x.detach() if isinstance(x, Tensor) else x


def _without_value(surrogate: Tensor | float) -> Tensor | float:
    return surrogate - _detached(surrogate)


def _with_paths(
    bound: Bound,
    particles: Particles,
    first: Tensor,
    paths: Tensor,
    score: Tensor | float = 0.0,
) -> Tensor:
    """Return the objective without explicit terms, and with coefficients of its own on the paths.

    If one pass is enough, the gates between draws and leaves are opened, so that the gradient of
    log p goes on to the parameters of the guide. The gradient of log q on the paths is computed
    before, at closed gates.

    :param first: the coefficients f_k of log q.
    :param paths: the coefficients of log p - log q on the paths.
    :param score: a term to subtract on the paths.
    """
    draws = particles.global_draws + particles.draws
    model = None
    if take_gates(draws) and bound.guide_bound is bound:
        model = set_ratios(particles, first, paths)
    log_q, outer = particles.log_q_rest, particles.outer_rest
    if model is None:
        return _in_two_passes(bound, particles, first, paths, log_q, outer, score)
    rest = first * _finite(log_q)
    of_guide = _total(particles, (rest - paths * _finite(particles.log_q)).sum(0)) - score
    of_guide = of_guide + sum(term.value.sum() for term in particles.outer_terms if term.is_leaf)
    gradients = partial_derivatives(of_guide, [draw.leaf for draw in draws])
    explicit = (model * _finite(particles.log_p) - rest).sum(0)
    surrogate = _total(particles, explicit) + outer + _reward(bound, particles)
    for draw, gradient in zip(draws, gradients, strict=True):
        draw.gate.factor = 1.0
        if gradient is not None:
            surrogate = surrogate + (gradient * draw.leaf).sum()
    return _value(bound, particles) + _without_value(surrogate)


def _in_two_passes(
    bound: Bound,
    particles: Particles,
    first: Tensor,
    paths: Tensor,
    log_q: Tensor,
    outer: Any,
    score: Tensor | float = 0.0,
) -> Tensor:
    """Return the objective with the gradients of the leaves from backward passes of their own.

    The paths of the explicit terms end at the leaves. The explicit terms belong to the model, and
    to the part of the guide in ``log_q`` and ``outer``.

    See :func:`_with_paths` for the other arguments.
    """
    gradients = _gradients_of_leaves(bound, particles, first, paths, score)
    model = first
    if bound.guide_bound is not bound:
        model = bound.model_weights(particles.log_w.detach())
    explicit = (model * _finite(particles.log_p) - first * _finite(log_q)).sum(0)
    surrogate = _total(particles, explicit) + outer + _reward(bound, particles)
    draws = particles.global_draws + particles.draws
    for draw, gradient in zip(draws, gradients, strict=True):
        surrogate = surrogate + (gradient * draw.value).sum()
    return _value(bound, particles) + _without_value(surrogate)


def _gradients_of_leaves(
    bound: Bound, particles: Particles, first: Tensor, paths: Tensor, score: Tensor | float
) -> list[Tensor]:
    """Return the derivatives of an objective at the leaves of all draws, from passes of their own.

    See :func:`_with_paths` for the arguments.
    """
    along_paths = _weighted(particles, first) + particles.outer + _reward(bound, particles)
    global_draws, draws = particles.global_draws, particles.draws
    if paths is first:
        return leaf_gradients(global_draws + draws, along_paths)
    replaced = _weighted(particles, first - paths) + score
    factors = [density_factor(draw, particles.scale) for draw in draws]
    if not global_draws and all(factor is None for factor in factors):
        return leaf_gradients(draws, along_paths - replaced)
    gradients = leaf_gradients(global_draws + draws, along_paths)
    explicit = leaf_gradients(draws, replaced)
    for i, (factor, gradient) in enumerate(zip(factors, explicit, strict=True)):
        i += len(global_draws)
        gradients[i] = gradients[i] - (gradient if factor is None else factor * gradient)
    return gradients
