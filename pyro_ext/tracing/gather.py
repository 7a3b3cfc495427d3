"""The log weights of K particles, summed from their traces."""

import math
from collections.abc import Sequence, Set
from operator import attrgetter

import torch
from torch import Tensor

from pyro_ext.tracing.density_sites import DensitySite, Plate, plates_of
from pyro_ext.tracing.layout import Layout, OuterTerm, at_least_single
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.rewards import score_sites, score_terms, split_scores, without_score
from pyro_ext.tracing.run import ParticleTraces, SiteKey
from pyro_ext.tracing.sites import has_particles
from pyro_ext.tracing.user_scales import along, divided, uniform_scale


def gather_particles(
    traces: ParticleTraces,
    common: Sequence[Plate],
    outside: Set[SiteKey],
    local_plate: str | None,
    splits_rewards: bool = False,
) -> Particles:
    """Sum the log-probabilities of the traces to tensors of shape ``(K, *common)``.

    :param traces: the traces of K particles.
    :param common: the common plates, from left to right.
    :param outside: the keys of the sites whose log ratio is not part of the log weights.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    :param splits_rewards: whether the reward of a non-reparameterised site excludes the terms in
        other elements of its plates. This is right if the bound is linear.
    """
    rows = traces.density_sites
    by_key = {site.key: site for row in rows for site in row}
    replaced = [draw for draw in traces.draws if draw.is_replaced]
    leaves = {("guide", draw.name) for draw in replaced if not draw.is_point}
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
    scale = plate_scale * along(uniform_scale(records, dims), dims)

    density = without_score if splits_rewards else attrgetter("log_prob")

    def log_density(program: str, without: Set[SiteKey]) -> Tensor:
        total = layout.stack(
            [density(s) for s in row if s.program == program and s.key not in without]
            for row in rows
        )
        return divided(total, scale)

    log_q = log_density("guide", outside)
    terms = score_terms(traces, local_plate)
    return Particles(
        log_p=log_density("model", outside),
        log_q=log_q,
        log_q_rest=log_density("guide", outside | leaves) if leaves else log_q,
        scale=scale,
        user_scale=uniform_scale([traces.record(site) for site in by_key.values()], dims),
        outer_terms=tuple(
            _outer_term(traces, by_key[key], key in leaves) for key in by_key if key in outside
        ),
        global_scores=tuple(
            OuterTerm(term, plates_of(node))
            for node, term in score_sites(traces.guide_traces[0])
            if not has_particles(node, local_plate)
        ),
        score=layout.stack([t.value for t in row] for row in terms) if any(terms) else None,
        split_scores=split_scores(traces, terms, outside) if splits_rewards else None,
        plates=tuple(common),
        draws=tuple(draw for draw in replaced if not draw.is_global),
        global_draws=tuple(draw for draw in replaced if draw.is_global),
        points=tuple(draw for draw in traces.draws if not draw.is_replaced),
        model_traces=traces.model_traces,
        guide_traces=traces.guide_traces,
        density_sites=rows,
    )


def _outer_term(traces: ParticleTraces, site: DensitySite, is_leaf: bool) -> OuterTerm:
    log_prob = at_least_single(traces.one_particle(site.log_prob))
    return OuterTerm(log_prob if site.program == "model" else -log_prob, site.plates, is_leaf)
