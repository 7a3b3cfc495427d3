"""Traces of a model and a guide for K particles, at once in a plate or one after the other."""

import math
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext._random_states import kept_random_states
from pyro_ext.tracing.advice import Advice
from pyro_ext.tracing.combined_draws import num_draws_of
from pyro_ext.tracing.density_sites import DensitySite, density_sites
from pyro_ext.tracing.enumeration import NeedsEnumerationError, marginal_sites
from pyro_ext.tracing.leaves import Draw, LeafDraws, Leaves
from pyro_ext.tracing.matching import (
    SiteRecord,
    SiteRecorder,
)
from pyro_ext.tracing.particle_plate import ParticlePlate
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.shared_values import SharedGlobals, SharedSubsamples, with_one_minibatch
from pyro_ext.tracing.sites import (
    ParticleDimError,
    SiteError,
    global_site_error,
    has_dim,
    is_masked_out,
)

SiteKey = tuple[str, str]


@dataclass(frozen=True)
class ParticleTraces:
    """The traces of K particles.

    If the particles ran at once, there is one trace of the model and one of the guide. Otherwise
    there is one of each for each particle.

    :ivar particle_dim: the dim of the particles, negative; None if they ran one after the other.
    :ivar records: a dict from a tuple of program and site name to the record of the site.
    :ivar draws: the draws that leaves replaced.
    :ivar num_draws: the number of draws of each guide site along a dim of its own; None if the
        sites have no such dims.
    """

    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]
    num_particles: int
    particle_dim: int | None
    records: dict[SiteKey, SiteRecord]
    draws: tuple[Draw, ...]
    num_draws: int | None = None

    @property
    def are_vectorized(self) -> bool:
        """Whether several particles, or several draws of the sites, ran at once."""
        several = self.particle_dim is not None and self.num_particles > 1
        return several or self.num_draws is not None

    def record(self, site: DensitySite) -> SiteRecord:
        """Return the record of a site.

        A guide that runs the model itself has the records of the model's sites.
        """
        return self.records.get(site.key) or self.records["guide", site.name]

    @cached_property
    def density_sites(self) -> list[list[DensitySite]]:
        """The density sites of each model trace and its guide trace."""
        if self.num_draws is not None:
            (model_trace,), (guide_trace,) = self.model_traces, self.guide_traces
            guide_trace.pack_tensors()
            sites = density_sites("model", model_trace) + density_sites("guide", guide_trace)
            return [marginal_sites(model_trace, sites, guide_trace.plate_to_symbol)]
        return [
            marginal_sites(model_trace, density_sites("model", model_trace))
            + density_sites("guide", guide_trace)
            for model_trace, guide_trace in zip(self.model_traces, self.guide_traces, strict=True)
        ]

    @cached_property
    def sites_by_draw(self) -> list[DensitySite]:
        """The density sites of the first traces, without sums over the draws of a site."""
        if self.num_draws is None:
            return self.density_sites[0]
        model_trace, guide_trace = self.model_traces[0], self.guide_traces[0]
        in_model = marginal_sites(model_trace, density_sites("model", model_trace))
        return in_model + density_sites("guide", guide_trace)

    @torch.no_grad()
    def has_particle_dim(self, site: DensitySite) -> bool:
        """Return whether a site has the particle dim before the particle plate expands it.

        A transform of the distribution may have the dim although the batch shape lacks it. So the
        shape of the log-probability is checked too.
        """
        if site.members:
            return any(map(self.has_particle_dim, site.members))
        record = self.record(site)
        if record.has_particle_dim or self.particle_dim is None:
            return True
        if record.value is None:  # enumerated after the record
            return False
        return has_dim(record.fn.log_prob(record.value).shape, self.particle_dim)

    def one_particle(self, x: Tensor, event_dim: int = 0, index: int = 0) -> Tensor:
        """Return one particle's entry of a log-probability or value from the first traces.

        If sites have several draws, it is the entry of the draws with one index.

        :param x: the log-probability or value.
        :param event_dim: the number of event dims of ``x``.
        :param index: the index of the particle.
        """
        for dim in self._dims_of_draws:
            if x.dim() >= event_dim - dim:
                at = dim - event_dim
                x = x.select(at, index if x.shape[at] > 1 else 0)
        return x

    @property
    def _dims_of_draws(self) -> list[int]:
        """The particle dim, or the dims of the draws of each site, from left to right."""
        if self.num_draws is None:
            return [] if self.particle_dim is None else [self.particle_dim]
        nodes: Any = self.guide_traces[0].nodes.values()
        drawn = [n for n in nodes if n["type"] == "sample" and num_draws_of(n) is not None]
        return sorted(node["infer"]["_enumerate_dim"] for node in drawn)


def run_at_once(
    programs: Programs,
    num_particles: int,
    max_plate_nesting: float,
    subsamples: SharedSubsamples | None,
    local_plate: str | None,
    leaves: Leaves,
    advice: Advice,
    enumerates: bool = False,
) -> ParticleTraces:
    """Trace model and guide with the K particles in a plate to the left of all others.

    :param programs: the model and guide.
    :param num_particles: the number of particles K.
    :param max_plate_nesting: the number of nested plates.
    :param subsamples: the minibatch indices to use, or to record.
    :param local_plate: the name of the plate whose sites are drawn once for each particle; None if
        all sites are.
    :param leaves: the places where leaves replace the reparameterised draws.
    :param advice: the advice of error messages.
    :param enumerates: whether to enumerate the marked sites of the model.
    :raises NeedsEnumerationError: if a site is marked, and ``enumerates`` is False.
    :raises ValueError: if the model or guide fails with K particles but runs with one, or if a site
        does not match between model and guide.
    """
    particle_dim = -1 - int(max_plate_nesting)
    in_guide = SiteRecorder(particle_dim, advice, local_plate=local_plate)
    in_model = SiteRecorder(particle_dim, advice, in_guide, local_plate, enumerates)
    plate = ParticlePlate(num_particles, particle_dim, local_plate)
    recorded = programs.each_under(in_model, in_guide).each_under(plate, plate)
    if enumerates:
        recorded = recorded.enumerated(particle_dim - 1)
    with _leaf_draws(leaves, local_plate, programs) as found, subsamples or nullcontext():
        try:
            model_trace, guide_trace = recorded.importance_traces(-particle_dim)
        except torch.linalg.LinAlgError as error:
            error.add_note(f"The {_last_place(in_model, in_guide)}.")
            raise
        except (SiteError, NeedsEnumerationError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if _runs_alone(programs, subsamples):
                where = f"num_particles={num_particles} vectorised in a plate at dim {particle_dim}"
                outside = (
                    "Check that the guide draws inside the support of the model. "
                    if "to be within the support" in str(error)
                    else ""
                )
                raise ParticleDimError(
                    f"The {_last_place(in_model, in_guide)} with {where}, but it runs with one "
                    f"particle. {outside}Every sample has an extra dim on the left. Count dims "
                    "from the right (x[..., 0] and .mT), wrap convolutions in "
                    "pyro_ext.nn.LeadingDims, correct max_plate_nesting, or "
                    f"{advice.one_at_a_time}.\n"
                    f"{_described(error)}"
                ) from error
            raise
    for program, trace in (("model", model_trace), ("guide", guide_trace)):
        _check_dims(program, trace, particle_dim)
    return ParticleTraces(
        (model_trace,),
        (guide_trace,),
        num_particles,
        particle_dim,
        _by_program(in_model, in_guide),
        tuple(found.draws),
    )


def run_in_turn(
    programs: Programs,
    num_particles: int,
    max_plate_nesting: float,
    subsamples: SharedSubsamples | None,
    local_plate: str | None,
    leaves: Leaves,
    advice: Advice,
    enumerates: bool = False,
    num_draws: int | None = None,
) -> ParticleTraces:
    """Trace model and guide once for each particle, all with the same minibatch.

    :param max_plate_nesting: the number of nested plates for Pyro's checks; may be infinite.
    :param num_draws: the number of draws of each guide site along a dim of its own, for a single
        particle; None for one draw without such a dim.

    See :func:`run_at_once` for the other arguments.
    """
    rows = subsamples or SharedSubsamples()
    shared_globals = nullcontext() if local_plate is None else SharedGlobals(local_plate)
    model_traces, guide_traces = [], []
    all_draws: list[Draw] = []
    records: dict[SiteKey, SiteRecord] = {}
    for k in range(num_particles):
        in_guide = SiteRecorder(None, advice)
        in_model = SiteRecorder(None, advice, in_guide, enumerates=enumerates)
        with _leaf_draws(leaves, local_plate, programs, k) as found, rows, shared_globals:
            recorded = programs.each_under(in_model, in_guide)
            if num_draws is not None:
                recorded = recorded.combined(num_draws, -1 - int(max_plate_nesting))
            elif enumerates:
                recorded = recorded.enumerated(-1 - int(max_plate_nesting))
            model_trace, guide_trace = recorded.importance_traces(max_plate_nesting)
        model_traces.append(model_trace)
        guide_traces.append(guide_trace)
        all_draws += found.draws
        records |= _by_program(in_model, in_guide)
    return ParticleTraces(
        tuple(model_traces),
        tuple(guide_traces),
        num_particles,
        None,
        records,
        tuple(all_draws),
        num_draws,
    )


def _leaf_draws(
    leaves: Leaves, local_plate: str | None, programs: Programs, particle: int | None = None
) -> AbstractContextManager[LeafDraws]:
    """Collect the draws that leaves replace, while model and guide run."""
    if programs.guide_runs_model and leaves is Leaves.IN_MODEL:
        leaves = Leaves.EVERYWHERE_WITH_POINTS  # there is no run of the model alone
    handler = LeafDraws(leaves, local_plate, programs.guide_runs_model, particle)
    return nullcontext(handler) if leaves is Leaves.NOWHERE else _collected(handler)


@contextmanager
def _collected(handler: LeafDraws) -> Iterator[LeafDraws]:
    try:
        with handler:
            yield handler
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(error, SiteError) and error.__cause__ is None:
            raise
        handler.raise_without_inverse(error)
        raise


def _check_dims(program: str, trace: Trace, particle_dim: int) -> None:
    """Raise a SiteError if a log-probability has a dim that is no plate or particle dim.

    Pyro's own check allows dims between the plates and the particle dim. A site that lost its
    filler dims, with shape (K,) instead of (K, 1), would then count K x K terms.
    """
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_masked_out(node):
            continue
        shape = node["log_prob"].shape
        dims = {frame.dim for frame in node["cond_indep_stack"]}
        dims |= (node["infer"] or {}).get("_dim_to_id", {}).keys()
        stray = [d for d in range(-len(shape), 0) if shape[d] != 1 and d not in dims]
        if particle_dim in stray:
            raise global_site_error(program, name)
        if stray:
            raise ParticleDimError(
                f"Site '{name}' of the {program} has a log-probability of shape {tuple(shape)}, "
                f"with the particles at dim {particle_dim}. It must have size 1 at dim "
                f"{stray[-1]}, where there is no plate. Keep the filler dims of samples (sum with "
                "keepdim=True, do not squeeze), or put the dim in a plate."
            )


def _by_program(in_model: SiteRecorder, in_guide: SiteRecorder) -> dict[SiteKey, SiteRecord]:
    return {
        (program, name): record
        for program, recorder in (("model", in_model), ("guide", in_guide))
        for name, record in recorder.sites.items()
    }


def _described(error: Exception) -> str:
    """Return the type and text of an error, or its place if it has no text."""
    if str(error):
        return f"{type(error).__name__}: {error}"
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.filename}, line {place.lineno}: {place.line}"


def _runs_alone(programs: Programs, subsamples: SharedSubsamples | None) -> bool:
    """Return whether one particle runs where several at once have failed."""
    try:
        with poutine.block(), torch.no_grad(), kept_random_states():
            # A copy, because the handler itself is active outside of the block.
            with_one_minibatch(programs, copy(subsamples)).importance_traces(math.inf)
    except Exception:
        return False
    return True


def _last_place(in_model: SiteRecorder, in_guide: SiteRecorder) -> str:
    program, recorder = ("model", in_model) if in_model.sites else ("guide", in_guide)
    where = f"after its site '{list(recorder.sites)[-1]}'" if recorder.sites else "at its start"
    return f"{program} failed {where}"
