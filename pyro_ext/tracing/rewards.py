"""Non-reparameterised sites of the guide, and the log weights that reward them."""

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.util import is_identically_zero
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.density_sites import DensitySite, plates_of
from pyro_ext.tracing.layout import Layout, OuterTerm, at_least_single
from pyro_ext.tracing.particles import Score
from pyro_ext.tracing.run import ParticleTraces, SiteKey
from pyro_ext.tracing.sites import has_particles


def score_sites(guide_trace: Trace) -> Iterator[tuple[Any, Tensor]]:
    """Yield the node and the score-function term of each non-reparameterised guide site."""
    for site in guide_trace.nodes.values():
        if site["type"] == "sample" and _is_drawn(site):
            term = site["score_parts"].score_function
            if not is_identically_zero(term):
                yield site, term


def _is_drawn(node: Any) -> bool:
    """Return whether a site may stand for draws: its own, or those of a factor's author."""
    return not node["is_observed"] or isinstance(node["fn"], Unit)


def score_terms(traces: ParticleTraces, local_plate: str | None) -> list[list[OuterTerm]]:
    """Return the score-function terms of the sites with particles, for each guide trace."""
    return [
        [
            OuterTerm(term, plates_of(node))
            for node, term in score_sites(trace)
            if has_particles(node, local_plate)
        ]
        for trace in traces.guide_traces
    ]


def without_score(site: DensitySite) -> Tensor:
    """Return the log-probability of a site, with the gradient only of its reparameterised part."""
    if site.program == "model" or not _is_drawn(site.node):
        return site.log_prob
    parts = site.node["score_parts"]
    if is_identically_zero(parts.score_function):
        return site.log_prob
    value, path = site.log_prob.detach(), parts.entropy_term
    return value if is_identically_zero(path) else value + (path - path.detach())


def split_scores(
    traces: ParticleTraces,
    terms: Sequence[Sequence[OuterTerm]],
    outside: Set[SiteKey],
) -> tuple[Score, ...]:
    """Return an entry for each set of plates around non-reparameterised sites.

    Its log weights sum the log ratios of all sites over all plates, except the plates in the set.

    :param traces: the traces of K particles.
    :param terms: the result of :func:`score_terms`.
    :param outside: the keys of the sites whose log ratio is no reward.
    """
    ratios = [
        [
            OuterTerm(site.log_prob if site.program == "model" else -site.log_prob, site.plates)
            for site in row
            if site.key not in outside
        ]
        for row in traces.density_sites
    ]
    found = []
    for plates in dict.fromkeys(t.plates for row in terms for t in row):
        kept = sorted((p for p in plates if p.dim is not None), key=lambda plate: plate.dim or 0)
        layout = Layout(
            traces.num_particles,
            traces.particle_dim,
            torch.Size(plate.size for plate in kept),
            {traces.particle_dim, *(plate.dim for plate in kept)},
            like=at_least_single(next(t.value for row in terms for t in row)),
        )
        log_q = layout.stack([t.value for t in row if t.plates == plates] for row in terms)
        log_w = layout.stack([ratio.sum_to(plates) for ratio in row] for row in ratios)
        found.append(Score(log_q, log_w))
    return tuple(found)
