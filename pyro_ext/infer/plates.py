"""Which plates keep weights of their own, and which make a nonlinear bound wrong."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_ext.infer.tracing import PARTICLE_PLATE


def plates_of(site: Any) -> frozenset[CondIndepStackFrame]:
    """The plates that enclose a site, without the particle plate."""
    return frozenset(f for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE)


def density_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sample sites that add to the density: neither deterministic nor masked out as a whole."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["mask"] is False:
            continue
        if getattr(site["fn"], "_mask", None) is not False:
            yield name, site


def subsampling_scale(frame: CondIndepStackFrame) -> float:
    """Size over subsample size of a plate."""
    return 1.0 if frame.full_size is None else frame.full_size / frame.size


def find_common_plates(
    model_traces: Sequence[Trace],
    guide_traces: Sequence[Trace],
    depends: Callable[[str], bool],
) -> tuple[CondIndepStackFrame, ...]:
    """The vectorised plates, left to right, that enclose all that depends on the particle.

    Those are the latent sites of model and guide and the observed sites that depend on them.
    """
    latent: list[tuple[str, frozenset[CondIndepStackFrame]]] = []
    observed: list[tuple[str, frozenset[CondIndepStackFrame]]] = []
    for trace in (*model_traces, *guide_traces):
        for name, site in density_sites(trace):
            (observed if site["is_observed"] else latent).append((name, plates_of(site)))
    stacks = [stack for _, stack in latent or observed]
    common = frozenset.intersection(*stacks) if stacks else frozenset()
    common = frozenset(f for f in common if f.vectorized)
    for name, stack in observed:
        if not common <= stack and depends(name):
            common &= stack
    return tuple(sorted(common, key=lambda f: f.dim or 0))


def check_subsampling(
    model_traces: Sequence[Trace],
    guide_traces: Sequence[Trace],
    common: Sequence[CondIndepStackFrame],
    depends: Callable[[str], bool],
) -> None:
    """Raises if a plate is subsampled inside the bound, which is not linear."""
    for trace in (*model_traces, *guide_traces):
        for name, site in density_sites(trace):
            for frame in plates_of(site).difference(common):
                if subsampling_scale(frame) == 1 or (site["is_observed"] and not depends(name)):
                    continue
                raise ValueError(
                    f"Plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) but "
                    f"{_why_not_common(frame, model_traces, guide_traces)}; with more than one "
                    "particle its scale would enter a nonlinear bound, which would then be wrong. "
                    "Expected a vectorised plate around every latent site, or the full data: move "
                    "global latents into pyro.param, do not subsample, or use num_particles=1."
                )


def warn_of_joint_weights(
    model_traces: Sequence[Trace], guide_traces: Sequence[Trace], warned: set[str]
) -> None:
    """Warns once of each plate that holds all the data but has one weight for all of it.

    To be called where no plate is common.

    :param set warned: names of the plates already warned of; added to.
    """
    stacks = [
        {f.name: f for f in plates_of(site)}
        for trace in model_traces
        for _, site in density_sites(trace)
        if site["is_observed"]
    ]
    if not stacks:
        return
    for name in set.intersection(*map(set, stacks)) - warned:
        warned.add(name)
        warnings.warn(
            f"Plate '{name}' holds all the data but "
            f"{_why_not_common(stacks[0][name], model_traces, guide_traces)}: each particle gets "
            "one weight for the whole plate, which bounds the joint evidence loosely. Expected "
            "for global latent variables; otherwise move the site into the plate.",
            stacklevel=2,
        )


def _why_not_common(
    frame: CondIndepStackFrame, model_traces: Sequence[Trace], guide_traces: Sequence[Trace]
) -> str:
    if not frame.vectorized:
        return "is sequential"
    # Latent sites first: they are what a user can move.
    for is_observed in (False, True):
        for program, traces in (("model", model_traces), ("guide", guide_traces)):
            for trace in traces:
                for name, site in density_sites(trace):
                    if site["is_observed"] is is_observed and frame not in plates_of(site):
                        return f"does not enclose the site '{name}' of the {program}"
    return "does not enclose all sites"
