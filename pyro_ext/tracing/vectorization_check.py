"""A check that a vectorised particle equals the same particle run alone."""

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.tracing.density_sites import density_sites
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.shared_values import SharedSubsamples
from pyro_ext.tracing.tracer import ParticleTracer


@torch.no_grad()
def check_vectorization(tracer: ParticleTracer, programs: Programs) -> None:
    """Raise a ValueError if a vectorised particle differs from the same particle run alone.

    The last of K vectorised particles is scored again alone, and compared site by site.

    :param tracer: a tracer that runs several particles at once.
    :param programs: the model and guide.
    :raises ValueError: if a log-probability differs by more than the square root of its dtype's
        rounding error. The message names the first such site.
    :raises NotImplementedError: if the guide is a GuideMessenger, which runs the model.
    """
    if programs.guide_runs_model:
        raise NotImplementedError(
            "check does not support a GuideMessenger, because that guide runs the model. Compare "
            "losses with vectorize_particles=False instead."
        )
    subsamples = SharedSubsamples()
    with poutine.block():
        traces = tracer.run(programs, subsamples=subsamples)
        with subsamples:
            alone = poutine.trace(programs.guide).get_trace(*programs.args, **programs.kwargs)
            node: Any
            for name, node in alone.iter_stochastic_nodes():
                if not site_is_subsample(node):
                    value: Any = traces.guide_traces[0].nodes[name]["value"]
                    value = traces.one_particle(value, node["fn"].event_dim, index=-1)
                    node["value"] = value.reshape(node["value"].shape)
            replayed = programs.each_under(lambda model: model, poutine.replay(trace=alone))
            model_trace, guide_trace = replayed.importance_traces(tracer.plate_nesting(programs))
    for program, vectorized, single in (
        ("model", traces.model_traces[0], model_trace),
        ("guide", traces.guide_traces[0], guide_trace),
    ):
        for site in density_sites(program, single):
            found = traces.one_particle(vectorized.nodes[site.name]["log_prob"], index=-1)
            _compare(f"Site '{site.name}' of the {program}", found, site.log_prob)


def _compare(site: str, found: Tensor, expected: Tensor) -> None:
    if found.numel() != expected.numel():
        raise ValueError(
            f"{site} has a log-probability of shape {tuple(found.shape)} in a vectorised particle, "
            f"but of shape {tuple(expected.shape)} in the same particle alone. Index dims from "
            "the right, or pass vectorize_particles=False."
        )
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    difference = (found.reshape(expected.shape) - expected).abs()
    if not (difference <= tolerance * (1 + expected.abs())).all():
        raise ValueError(
            f"{site} has another log-probability in a vectorised particle than in the same "
            f"particle alone (sums: {found.sum().item():.6g} and {expected.sum().item():.6g}). "
            "A module mixes particles (BatchNorm in training mode, a reshape over the particle "
            "dim) or is random (dropout). Put it in evaluation mode, wrap it in "
            "pyro_ext.nn.LeadingDims, or pass vectorize_particles=False."
        )
