"""The log weights of K particles, summed from their traces."""

import math
import numbers
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.density_sites import DensitySite, Plate, plates_of
from pyro_ext.tracing.layout import Layout, OuterTerm, at_least_single
from pyro_ext.tracing.matching import SiteRecord
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.run import ParticleTraces, SiteKey
from pyro_ext.tracing.sites import has_particles


def gather_particles(
    traces: ParticleTraces,
    common: Sequence[Plate],
    outside: Set[SiteKey],
    local_plate: str | None,
) -> Particles:
    """Sum the log-probabilities of the traces to tensors of shape ``(K, *common)``.

    :param traces: the traces of K particles.
    :param common: the common plates, from left to right.
    :param outside: the keys of the sites whose log ratio is not part of the log weights.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    """
    rows = traces.density_sites
    by_key = {site.key: site for row in rows for site in row}
    leaves = {("guide", draw.name) for draw in traces.draws}
    dims = [plate.dim for plate in common if plate.dim is not None]
    layout = Layout(
        traces.num_particles,
        traces.particle_dim,
        torch.Size(plate.size for plate in common),
        {traces.particle_dim, *dims},
        like=next((at_least_single(s.log_prob) for s in by_key.values()), torch.zeros(())),
    )
    records = [traces.record(site) for key, site in by_key.items() if key not in outside]
    plate_scale = math.prod(plate.subsampling_scale for plate in common)
    scale = plate_scale * _uniform_scale(records, dims)

    def log_density(program: str, without: Set[SiteKey]) -> Tensor:
        total = layout.stack(
            [s.log_prob for s in row if s.program == program and s.key not in without]
            for row in rows
        )
        if isinstance(scale, numbers.Number) and scale == 1:
            return total
        # Where the scale is zero, the scaled log-probabilities are zero already.
        return total / (scale.masked_fill(scale == 0, 1) if isinstance(scale, Tensor) else scale)

    log_q = log_density("guide", outside)
    scores = [
        [term for node, term in score_sites(trace) if has_particles(node, local_plate)]
        for trace in traces.guide_traces
    ]
    return Particles(
        log_p=log_density("model", outside),
        log_q=log_q,
        log_q_rest=log_density("guide", outside | leaves) if leaves else log_q,
        scale=scale,
        outer_terms=tuple(
            _outer_term(traces, by_key[key], key in leaves) for key in by_key if key in outside
        ),
        global_scores=tuple(
            OuterTerm(term, plates_of(node))
            for node, term in score_sites(traces.guide_traces[0])
            if not has_particles(node, local_plate)
        ),
        score=layout.stack(scores) if any(scores) else None,
        plates=tuple(common),
        draws=tuple(draw for draw in traces.draws if not draw.is_global),
        global_draws=tuple(draw for draw in traces.draws if draw.is_global),
        model_traces=traces.model_traces,
        guide_traces=traces.guide_traces,
    )


def _outer_term(traces: ParticleTraces, site: DensitySite, is_leaf: bool) -> OuterTerm:
    log_prob = at_least_single(traces.one_particle(site.log_prob))
    return OuterTerm(log_prob if site.program == "model" else -log_prob, site.plates, is_leaf)


def score_sites(guide_trace: Trace) -> Iterator[tuple[Any, Tensor]]:
    """Yield the node and the score-function term of each non-reparameterised guide site."""
    for site in guide_trace.nodes.values():
        if site["type"] == "sample":
            term = site["score_parts"].score_function
            if not is_identically_zero(term):
                yield site, term


def _uniform_scale(records: Sequence[SiteRecord], dims: Sequence[int]) -> Any:
    """Return the product of the user's scales if it is the same at every site, else 1.

    Two scale tensors count as the same only if they are the same object. Such a tensor must have
    size 1 along every dim that is not a common plate.
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
