from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.density_sites import Plate
from pyro_ext.tracing.layout import OuterTerm
from pyro_ext.tracing.leaves import Draw


@dataclass(frozen=True)
class Particles:
    r"""What one trace of K particles yields: all that a bound and a gradient rule need.

    With common plates :math:`n`, the estimate of the log evidence is
    :math:`\mathrm{scale} \cdot \sum_n f(\log w_{1n}, \dots, \log w_{Kn}) + \mathrm{outer}`.

    :ivar log_p: ``(K, *common)``, log p(x, z) of each particle, summed over every dim that is not
        a common plate, without the scale of the common plates.
    :ivar log_q: ``(K, *common)``, log q(z), likewise.
    :ivar log_q_rest: the part of ``log_q`` that does not come from draws replaced by leaves: of
        Deltas, factors and non-reparameterised sites; all of it unless leaves were asked for.
    :ivar scale: size over subsample size of the common plates, times a user's scale that is the
        same at every site; a number, or a tensor that broadcasts against ``common``. It belongs
        outside the bound.
    :ivar outer_terms: the log ratios that neither depend on the particle nor lie in all of the
        common plates, to be added to the bound. With a local plate, those of all sites outside.
    :ivar global_scores: log q of the non-reparameterised sites of the guide outside of the local
        plate, neither scaled nor masked.
    :ivar score: ``(K, *common)``, log q of the non-reparameterised sites of the guide, neither
        scaled nor masked; None if there are none.
    :ivar plates: the common plates, left to right.
    :ivar draws: pairs of a reparameterised draw and its leaf, in the order of sampling; empty
        unless leaves were asked for.
    :ivar global_draws: likewise, of the sites outside of the local plate, drawn once.
    :ivar model_traces: one trace if the particles are vectorised, else one for each.
    :ivar guide_traces: likewise.
    """

    log_p: Float[Tensor, "K *common"]
    log_q: Float[Tensor, "K *common"]
    log_q_rest: Float[Tensor, "K *common"]
    scale: Any
    outer_terms: tuple[OuterTerm, ...]
    global_scores: tuple[OuterTerm, ...]
    score: Float[Tensor, "K *common"] | None
    plates: tuple[Plate, ...]
    draws: tuple[Draw, ...]
    global_draws: tuple[Draw, ...]
    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]

    @property
    def log_w(self) -> Float[Tensor, "K *common"]:
        """``(K, *common)``, the log importance weights log p(x, z) - log q(z)."""
        return self.log_p - self.log_q

    def reward_outside(
        self, objective: Float[Tensor, "*common"], plates: frozenset[Plate]
    ) -> Tensor:
        """The whole objective, summed to some plates: what sites in them are rewarded by.

        :param torch.Tensor objective: its part in the common plates, of shape ``common``.
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
    def outer_rest(self) -> Any:
        """The same without log q of the draws replaced by leaves."""
        return sum(term.value.sum() for term in self.outer_terms if not term.is_leaf)
