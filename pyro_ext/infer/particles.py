import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.infer.handlers import Draw, SiteRecord
from pyro_ext.infer.plates import DensitySite, Plate
from pyro_ext.infer.tracing import ParticleTraces


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
    :ivar outer: the sum of the log ratios that neither depend on the particle nor lie in all of
        the common plates; a number or a scalar tensor, to be added to the bound.
    :ivar score: ``(K, *common)``, log q of the non-reparameterised sites of the guide, neither
        scaled nor masked; None if there are none.
    :ivar plates: the common plates, left to right.
    :ivar draws: pairs of a reparameterised draw and its leaf, in the order of sampling; empty
        unless leaves were asked for.
    :ivar model_traces: one trace if the particles are vectorised, else one for each.
    :ivar guide_traces: likewise.
    """

    log_p: Tensor
    log_q: Tensor
    log_q_rest: Tensor
    scale: Any
    outer: Any
    score: Tensor | None
    plates: tuple[Plate, ...]
    draws: tuple[Draw, ...]
    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]

    @property
    def log_w(self) -> Tensor:
        """``(K, *common)``, the log importance weights log p(x, z) - log q(z)."""
        return self.log_p - self.log_q


def gather_particles(
    traces: ParticleTraces,
    sites: Sequence[Sequence[DensitySite]],
    common: tuple[Plate, ...],
    depends: Callable[[DensitySite], bool],
) -> Particles:
    """Sums the log-probabilities of the traces to one entry for each particle and common plate.

    :param ParticleTraces traces: the traces of K particles.
    :param sites: the density sites of each pair of traces.
    :param common: the common plates, left to right.
    :param depends: tells of an observed site outside of them whether it depends on the particle.
    """
    by_key = {(site.program, site.name): site for row in sites for site in row}
    outside = {
        key
        for key, site in by_key.items()
        if site.is_observed and not site.plates.issuperset(common) and not depends(site)
    }
    outer: Any = 0.0
    for program, name in outside:
        log_prob = traces.one_particle(by_key[program, name].log_prob)
        outer = outer + (1 if program == "model" else -1) * _at_least_single(log_prob).sum()

    dims = [plate.dim for plate in common if plate.dim is not None]
    layout = _Layout(
        traces.num_particles,
        traces.particle_dim,
        torch.Size(plate.size for plate in common),
        {traces.particle_dim, *dims},
        like=next((_at_least_single(s.log_prob) for s in by_key.values()), torch.zeros(())),
    )

    def log_density(program: str, without: set[tuple[str, str]]) -> Tensor:
        return layout.stack(
            [s.log_prob for s in row if s.program == program and s[:2] not in without]
            for row in sites
        )

    log_p, log_q = log_density("model", outside), log_density("guide", outside)
    leaves = {("guide", draw.name) for draw in traces.draws}
    log_q_rest = log_density("guide", outside | leaves) if leaves else log_q
    plate_scale = math.prod(plate.subsampling_scale for plate in common)
    user_scale = _uniform_scale([traces.record(*key) for key in by_key.keys() - outside], dims)
    scale = plate_scale * user_scale
    if not (isinstance(scale, numbers.Number) and scale == 1):
        # Where a weight of the data is zero, so are its scaled log-probabilities.
        divisor = scale.masked_fill(scale == 0, 1) if isinstance(scale, Tensor) else scale
        log_p, log_q, log_q_rest = log_p / divisor, log_q / divisor, log_q_rest / divisor

    scores = [[term for _, term in score_terms(trace)] for trace in traces.guide_traces]
    return Particles(
        log_p=log_p,
        log_q=log_q,
        log_q_rest=log_q_rest,
        scale=scale,
        outer=outer,
        score=layout.stack(scores) if any(scores) else None,
        plates=common,
        draws=traces.draws,
        model_traces=traces.model_traces,
        guide_traces=traces.guide_traces,
    )


def score_terms(guide_trace: Trace) -> Iterator[tuple[str, Tensor]]:
    """Name and score-function term of each non-reparameterised site of a guide's trace."""
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample":
            term = site["score_parts"].score_function
            if not is_identically_zero(term):
                yield name, term


class _Layout(NamedTuple):
    """Brings log-probabilities of sites to the shape ``(K, *common)``."""

    num_particles: int
    particle_dim: int | None
    shape: torch.Size
    kept: set[int | None]
    like: Tensor

    def stack(self, terms: Iterable[Sequence[Tensor]]) -> Tensor:
        """Adds up the terms of each trace, and stacks the traces unless they are vectorised."""
        rows = [self._row(row_terms) for row_terms in terms]
        if self.particle_dim is not None:
            return rows[0].expand(self.num_particles, *self.shape)
        return torch.stack([row.expand(self.shape) for row in rows])

    def _row(self, terms: Sequence[Tensor]) -> Tensor:
        if not terms:
            return self.like.new_zeros(())
        summed = [self._sum_out(term) for term in terms]
        return sum(summed[1:], summed[0])

    def _sum_out(self, term: Tensor) -> Tensor:
        dims = [dim for dim in range(-term.dim(), 0) if dim not in self.kept]
        term = _at_least_single(term)
        return term.sum(dims) if dims else term


def _at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _uniform_scale(records: Sequence[SiteRecord], dims: Sequence[int]) -> Any:
    """The product of the user's scales if it is the same at every site, else 1.

    A tensor counts as the same only if it is the same object, and has to be constant along
    every dim that is not a common plate.
    """
    keys = {
        tuple(s if isinstance(s, numbers.Number) else id(s) for s in record.user_scales)
        for record in records
    }
    if len(keys) != 1:
        return 1.0
    product: Any = 1.0
    for scale in records[0].user_scales:
        if isinstance(scale, Tensor):
            if any(scale.shape[d] != 1 for d in range(-scale.dim(), 0) if d not in dims):
                return 1.0
            scale = scale.reshape([scale.shape[d] if -d <= scale.dim() else 1 for d in dims])
        product = product * scale
    return product
