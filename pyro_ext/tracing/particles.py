from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.density_sites import DensitySite, Plate
from pyro_ext.tracing.layout import OuterTerm
from pyro_ext.tracing.leaves import Draw
from pyro_ext.tracing.user_scales import divided


class Score(NamedTuple):
    """log q of non-reparameterised guide sites in the same plates, and their rewards.

    :ivar log_q: log q of the sites, neither scaled nor masked, of shape ``(K, *plates)``.
    :ivar log_w: the log weights from which their learning signal is computed, of the same shape.
    """

    log_q: Float[Tensor, "K *plates"]
    log_w: Float[Tensor, "K *plates"]


@dataclass(frozen=True)
class Particles:
    r"""The log weights of K particles, with the other inputs of bounds and gradient rules.

    .. math::

        \mathrm{scale} \cdot \sum_n f(\log w_{1n}, \dots, \log w_{Kn}) + \mathrm{outer}

    For a bound f, this formula is the estimate of the log evidence. The sum runs over the elements
    n of the common plates. A common plate encloses every site that depends on the particle, and
    ``common`` stands for the sizes of these plates. A gradient rule may replace a draw by an
    autograd leaf with the same value.

    :ivar log_p: log p(x, z) of each particle, of shape ``(K, *common)``. It is summed over every
        dim that is not a common plate, and excludes the scale of the common plates.
    :ivar log_q: log q(z) of each particle, of shape ``(K, *common)``, summed and scaled like
        ``log_p``.
    :ivar log_q_rest: the part of ``log_q`` from the sites whose draws were not replaced by leaves,
        of shape ``(K, *common)``. These sites are Deltas, factors and non-reparameterised sites.
        Without leaves it equals ``log_q``.
    :ivar scale: the size of the common plates divided by their subsample size, times a user's scale
        that is the same at every site. It is a number, or a tensor that broadcasts against
        ``common``. It multiplies f itself and is not part of the log weights.
    :ivar user_scale: the user's scale that is the same at every site of model and guide; 1 if there
        is none. It is a number, or a tensor that broadcasts against the log-probabilities.
    :ivar outer_terms: the log ratios to add to the bound. They do not depend on the particle and
        lie outside at least one common plate. With a local plate, they include the log ratios of
        all sites outside this plate.
    :ivar global_scores: log q of the guide's non-reparameterised sites outside the local plate,
        neither scaled nor masked.
    :ivar score: log q of the guide's non-reparameterised sites, neither scaled nor masked, of shape
        ``(K, *common)``; None if there are none.
    :ivar split_scores: the same log q with the log weights that reward it, an entry for each set of
        plates around the sites; None if the log weights of the common plates reward it. The reward
        of a site excludes the terms in other elements of its plates. This is right if the bound is
        linear. The density of such a site is then detached in ``log_q``, because its gradient has
        mean zero.
    :ivar plates: the common plates, from left to right.
    :ivar draws: pairs of a reparameterised draw and the leaf that replaced it, in the order of
        sampling; empty if no leaves were requested.
    :ivar global_draws: the same pairs for the sites outside the local plate. These sites are drawn
        once.
    :ivar points: the values of the guide's Delta sites that no leaf replaced and that depend on
        parameters or draws; empty if no leaves were requested.
    :ivar model_traces: the traces of the model: a single one if the particles are vectorised, else
        one for each particle.
    :ivar guide_traces: the traces of the guide: a single one if the particles are vectorised, else
        one for each particle.
    :ivar density_sites: the sites of each model trace and its guide trace, with sums in the place
        of the sites that are summed out together.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
    >>> particles = ImportanceWeightedELBO(5).trace_particles(model, guide, (torch.zeros(3),))
    >>> particles.log_w.shape, [plate.name for plate in particles.plates]
    (torch.Size([5, 3]), ['data'])
    """

    log_p: Float[Tensor, "K *common"]
    log_q: Float[Tensor, "K *common"]
    log_q_rest: Float[Tensor, "K *common"]
    scale: Any
    user_scale: Any
    outer_terms: tuple[OuterTerm, ...]
    global_scores: tuple[OuterTerm, ...]
    score: Float[Tensor, "K *common"] | None
    split_scores: tuple[Score, ...] | None
    plates: tuple[Plate, ...]
    draws: tuple[Draw, ...]
    global_draws: tuple[Draw, ...]
    points: tuple[Draw, ...]
    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]
    density_sites: list[list[DensitySite]]

    @property
    def log_w(self) -> Float[Tensor, "K *common"]:
        """The log importance weights log p(x, z) - log q(z), of shape ``(K, *common)``."""
        return self.log_p - self.log_q

    def along(self, draw: Draw, x: Float[Tensor, "K *common"]) -> Tensor:
        """Return the entries of ``x`` for the elements of a draw.

        :param draw: a draw in the common plates.
        :param x: a tensor with an entry for each log weight.
        :returns: a tensor that broadcasts against the value of the draw.
        """
        event_dim = draw.fn.event_dim
        shape = [1] * draw.value.dim()
        for plate in self.plates:
            shape[(plate.dim or 0) - event_dim] = plate.size
        if draw.particle is not None:
            return x[draw.particle].reshape(shape)
        shape[0] = len(x)
        return x.reshape(shape)

    def reward_outside(
        self, objective: Float[Tensor, "*common"], plates: frozenset[Plate]
    ) -> Tensor:
        """Return the reward of guide sites outside the local plate.

        The reward is the whole objective, summed over all plates except ``plates``.

        :param objective: the part of the objective in the common plates, of shape ``common``.
        :param plates: the plates around the rewarded sites.
        :returns: a tensor that broadcasts against the log-probabilities of these sites.
        """
        dims = [plate.dim or 0 for plate in self.plates]
        shape = [1] * -min(dims, default=0)
        for dim, size in zip(dims, objective.shape, strict=True):
            shape[dim] = size
        inside = OuterTerm(objective.reshape(shape), frozenset(self.plates))
        return sum(
            (term.sum_to(plates).detach() for term in self.outer_terms), inside.sum_to(plates)
        )

    @property
    def outer(self) -> Any:
        """The sum of the outer terms: a scalar tensor, or 0 if there are none."""
        return sum(term.value.sum() for term in self.outer_terms)

    @property
    def unscaled_outer_terms(self) -> tuple[OuterTerm, ...]:
        """The outer terms without the user's scale that is the same at every site."""
        return tuple(t._replace(value=divided(t.value, self.user_scale)) for t in self.outer_terms)

    @property
    def unscaled_outer(self) -> float:
        """The sum of the outer terms without the user's scale that is the same at every site."""
        return sum(float(term.value.sum()) for term in self.unscaled_outer_terms)

    @property
    def outer_rest(self) -> Any:
        """The sum of the outer terms, without log q of the draws replaced by leaves."""
        return sum(term.value.sum() for term in self.outer_terms if not term.is_leaf)
