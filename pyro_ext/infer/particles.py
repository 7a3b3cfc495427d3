import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.infer.handlers import Draw, SiteRecord, lies_in
from pyro_ext.infer.plates import DensitySite, Plate, plates_of
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
    :ivar outer_terms: the log ratios that neither depend on the particle nor lie in all of the
        common plates, to be added to the bound. With a local plate, those of all sites outside.
    :ivar outer_scores: log q of the non-reparameterised sites of the guide outside of the local
        plate, neither scaled nor masked.
    :ivar score: ``(K, *common)``, log q of the non-reparameterised sites of the guide, neither
        scaled nor masked; None if there are none.
    :ivar plates: the common plates, left to right.
    :ivar draws: pairs of a reparameterised draw and its leaf, in the order of sampling; empty
        unless leaves were asked for.
    :ivar outer_draws: likewise, of the sites outside of the local plate.
    :ivar model_traces: one trace if the particles are vectorised, else one for each.
    :ivar guide_traces: likewise.
    """

    log_p: Tensor
    log_q: Tensor
    log_q_rest: Tensor
    scale: Any
    outer_terms: tuple["OuterTerm", ...]
    outer_scores: tuple["OuterTerm", ...]
    score: Tensor | None
    plates: tuple[Plate, ...]
    draws: tuple[Draw, ...]
    outer_draws: tuple[Draw, ...]
    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]

    @property
    def log_w(self) -> Tensor:
        """``(K, *common)``, the log importance weights log p(x, z) - log q(z)."""
        return self.log_p - self.log_q

    def reward_outside(self, objective: Tensor, plates: frozenset[Plate]) -> Tensor:
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


class OuterTerm(NamedTuple):
    """A term that no particle changes, with the plates around it."""

    value: Tensor
    plates: frozenset[Plate]
    is_leaf: bool = False

    def sum_to(self, plates: frozenset[Plate]) -> Tensor:
        """Sums over the plates other than those given."""
        dims = [p.dim for p in self.plates - plates if p.dim and -p.dim <= self.value.dim()]
        return self.value.sum(dims, keepdim=True) if dims else self.value


def gather_particles(
    traces: ParticleTraces,
    sites: Sequence[Sequence[DensitySite]],
    common: tuple[Plate, ...],
    is_outer: Callable[[DensitySite], bool],
    local_plate: str | None,
) -> Particles:
    """Sums the log-probabilities of the traces to one entry for each particle and common plate.

    :param ParticleTraces traces: the traces of K particles.
    :param sites: the density sites of each pair of traces.
    :param common: the common plates, left to right.
    :param is_outer: tells of a site whether its log ratio is not part of the log weights.
    :param str local_plate: the plate that holds the particles; None if they are around all.
    """
    by_key = {(site.program, site.name): site for row in sites for site in row}
    outside = {key for key, site in by_key.items() if is_outer(site)}
    leaves = {("guide", draw.name) for draw in traces.draws}
    outer_terms = []
    for program, name in outside:
        site = by_key[program, name]
        log_prob = _at_least_single(traces.one_particle(site.log_prob))
        value = log_prob if program == "model" else -log_prob
        outer_terms.append(OuterTerm(value, site.plates, (program, name) in leaves))

    dims = [plate.dim for plate in common if plate.dim is not None]
    layout = Layout(
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
    log_q_rest = log_density("guide", outside | leaves) if leaves else log_q
    plate_scale = math.prod(plate.subsampling_scale for plate in common)
    user_scale = _uniform_scale([traces.record(*key) for key in by_key.keys() - outside], dims)
    scale = plate_scale * user_scale
    if not (isinstance(scale, numbers.Number) and scale == 1):
        # Where a weight of the data is zero, so are its scaled log-probabilities.
        divisor = scale.masked_fill(scale == 0, 1) if isinstance(scale, Tensor) else scale
        log_p, log_q, log_q_rest = log_p / divisor, log_q / divisor, log_q_rest / divisor

    def has_particles(node: Any) -> bool:
        return local_plate is None or lies_in(node, local_plate)

    scores = [
        [term for node, term in score_sites(trace) if has_particles(node)]
        for trace in traces.guide_traces
    ]
    outer_scores = (
        OuterTerm(term, plates_of(node))
        for node, term in score_sites(traces.guide_traces[0])
        if not has_particles(node)
    )
    return Particles(
        log_p=log_p,
        log_q=log_q,
        log_q_rest=log_q_rest,
        scale=scale,
        outer_terms=tuple(outer_terms),
        outer_scores=tuple(outer_scores),
        score=layout.stack(scores) if any(scores) else None,
        plates=common,
        draws=tuple(draw for draw in traces.draws if not draw.is_outer),
        outer_draws=tuple(draw for draw in traces.draws if draw.is_outer),
        model_traces=traces.model_traces,
        guide_traces=traces.guide_traces,
    )


def score_sites(guide_trace: Trace) -> Iterator[tuple[Any, Tensor]]:
    """Node and score-function term of each non-reparameterised site of a guide's trace."""
    for site in guide_trace.nodes.values():
        if site["type"] == "sample":
            term = site["score_parts"].score_function
            if not is_identically_zero(term):
                yield site, term


class Layout(NamedTuple):
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
