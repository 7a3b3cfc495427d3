"""Whether a vectorised particle is the same as the particle alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_ext.infer.handlers import SharedSubsamples
from pyro_ext.infer.plates import density_sites
from pyro_ext.infer.tracing import run_particles


@torch.no_grad()
def check_vectorization(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    max_plate_nesting: float,
    local_plate: str | None,
) -> None:
    """Re-scores the last of K vectorised particles alone and compares site by site.

    :raises ValueError: names the first site whose log-probability differs by more than the square
        root of its dtype's rounding error.
    """
    if isinstance(poutine.unwrap(guide), Messenger):
        raise NotImplementedError(
            "check expects a guide that is a program of its own, got a GuideMessenger, which runs "
            "the model: compare losses with vectorize_particles=False instead."
        )
    subsamples = SharedSubsamples()
    with poutine.block():
        traces = run_particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorized=True,
            subsamples=subsamples,
            local_plate=local_plate,
        )
        with subsamples:
            alone = poutine.trace(guide).get_trace(*args, **kwargs)
            node: Any
            for name, node in alone.iter_stochastic_nodes():
                if not site_is_subsample(node):
                    value: Any = traces.guide_traces[0].nodes[name]["value"]
                    value = traces.one_particle(value, node["fn"].event_dim, index=-1)
                    node["value"] = value.reshape(node["value"].shape)
            model_trace, guide_trace = get_importance_trace(
                "flat", max_plate_nesting, model, poutine.replay(guide, alone), args, kwargs
            )
    programs = (
        ("model", traces.model_traces[0], model_trace),
        ("guide", traces.guide_traces[0], guide_trace),
    )
    for program, vectorized_trace, single_trace in programs:
        for site in density_sites(program, single_trace):
            name, expected = site.name, site.log_prob
            found = traces.one_particle(vectorized_trace.nodes[name]["log_prob"], index=-1)
            if found.numel() != expected.numel():
                raise ValueError(
                    f"Site '{name}' of the {program} has a log-probability of shape "
                    f"{tuple(found.shape)} in a vectorised particle, expected "
                    f"{tuple(expected.shape)} as in the same particle alone."
                )
            tolerance = torch.finfo(expected.dtype).eps ** 0.5
            difference = (found.reshape(expected.shape) - expected).abs()
            if not (difference <= tolerance * (1 + expected.abs())).all():
                raise ValueError(
                    f"Site '{name}' of the {program} has another log-probability in a vectorised "
                    f"particle than in the same particle alone: sums {found.sum().item():.6g} "
                    f"and {expected.sum().item():.6g}, expected equal ones. A module mixes "
                    "particles (BatchNorm in training mode, a reshape over the particle dim) or "
                    "is random (dropout): put it in evaluation mode, wrap it in "
                    "pyro_ext.nn.LeadingDims, or pass vectorize_particles=False."
                )
