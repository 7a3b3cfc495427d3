"""Runs a model and guide for K particles: vectorised in a plate, or one after the other."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.infer.handlers import (
    Draw,
    LeafDraws,
    SharedSubsamples,
    SiteError,
    SiteRecord,
    SiteRecorder,
    has_dim,
    is_masked_out,
    outside_of_local_plate,
    refuse_handlers_of_linear_objectives,
)
from pyro_ext.infer.local_plate import ParticlePlate, SharedGlobals


@dataclass(frozen=True)
class ParticleTraces:
    """The traces of K particles: one pair if vectorised, else one pair a particle."""

    model_traces: tuple[Trace, ...]
    guide_traces: tuple[Trace, ...]
    num_particles: int
    particle_dim: int | None
    records: dict[tuple[str, str], SiteRecord]
    draws: tuple[Draw, ...]

    def record(self, program: str, name: str) -> SiteRecord:
        """What was recorded of a site; a guide that runs the model itself records its sites."""
        return self.records.get((program, name)) or self.records["guide", name]

    @torch.no_grad()
    def depends_on_particle(self, program: str, name: str) -> bool:
        """Whether an observed site has the particle dim before the particle plate gives it one.

        A batch shape may lack the dim though a transform of the distribution has it; the shape of
        the log-probability does not.
        """
        record = self.record(program, name)
        if record.has_particle_dim or self.particle_dim is None:
            return True
        return has_dim(record.fn.log_prob(record.value).shape, self.particle_dim)

    def one_particle(self, x: Tensor, event_dim: int = 0, index: int = 0) -> Tensor:
        """One particle's entry of a log-probability or value out of the first traces."""
        if self.particle_dim is None or x.dim() < event_dim - self.particle_dim:
            return x
        return x.select(self.particle_dim - event_dim, index)


def run_particles(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    max_plate_nesting: float,
    vectorized: bool,
    leaves: bool = False,
    subsamples: SharedSubsamples | None = None,
    local_plate: str | None = None,
) -> ParticleTraces:
    """Traces the guide, and the model against it, once for each particle.

    :param int num_particles: the number of particles K.
    :param max_plate_nesting: the number of dims to the right of the particle dim; infinite is
        allowed where there is no particle dim.
    :param bool vectorized: whether the K particles run at once in a plate to the left.
    :param bool leaves: whether reparameterised draws are replaced by leaves.
    :param SharedSubsamples subsamples: minibatch indices to use, or to record.
    :param str local_plate: the name of the only plate to run K times; None to run all.
    :raises ValueError: where a site does not match between model and guide, or is enumerated;
        where the model or guide fails with K particles but runs with one.
    """
    if num_particles > 1:
        refuse_handlers_of_linear_objectives(num_particles)
    if not vectorized or num_particles == 1:
        return _trace_sequentially(
            model,
            guide,
            args,
            kwargs,
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            leaves=leaves,
            subsamples=subsamples or SharedSubsamples(),
            local_plate=local_plate,
        )
    particle_dim = -int(max_plate_nesting) - 1
    plate = ParticlePlate(num_particles, particle_dim, local_plate)
    in_guide = SiteRecorder(particle_dim, local_plate=local_plate)
    in_model = SiteRecorder(particle_dim, in_guide, local_plate)
    with ExitStack() as stack:
        handler = stack.enter_context(LeafDraws(local_plate)) if leaves else None
        if subsamples is not None:
            stack.enter_context(subsamples)
        try:
            model_trace, guide_trace = get_importance_trace(
                "flat", -particle_dim, plate(in_model(model)), plate(in_guide(guide)), args, kwargs
            )
        except Exception as error:
            if handler is not None:
                _refuse_without_inverse(handler.draws, error)
            if isinstance(error, (SiteError, torch.OutOfMemoryError)):
                raise
            if _runs_with_one_particle(model, guide, args, kwargs):
                raise ValueError(
                    _cannot_vectorize(num_particles, particle_dim, in_guide, in_model, error)
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
        tuple(handler.draws) if handler else (),
    )


def _check_dims(program: str, trace: Trace, particle_dim: int) -> None:
    """Raises where a log-probability has a dim that is neither a plate nor the particle dim.

    Pyro's own check lets dims between the plates and the particle dim pass, so that a site which
    lost its filler dims, of shape (K,) in place of (K, 1), would count K x K terms.
    """
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_masked_out(node):
            continue
        shape = node["log_prob"].shape
        dims = {frame.dim for frame in node["cond_indep_stack"]}
        stray = [d for d in range(-len(shape), 0) if shape[d] != 1 and d not in dims]
        if particle_dim in stray:
            raise SiteError(outside_of_local_plate(program, name))
        if stray:
            raise SiteError(
                f"Site '{name}' of the {program} has a log-probability of shape {tuple(shape)}, "
                f"with the particles in dim {particle_dim} and no plate at dim {stray[-1]}: "
                "expected size 1 there. Keep the filler dims of samples (sum with keepdim=True, "
                "do not squeeze), or put the dim in a plate."
            )


def _trace_sequentially(
    model: Callable,
    guide: Callable,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    num_particles: int,
    max_plate_nesting: float,
    leaves: bool,
    subsamples: SharedSubsamples,
    local_plate: str | None,
) -> ParticleTraces:
    model_traces, guide_traces, draws = [], [], []
    shared_globals = None if local_plate is None else SharedGlobals(local_plate)
    records: dict[tuple[str, str], SiteRecord] = {}
    for _ in range(num_particles):
        in_guide = SiteRecorder(None)
        in_model = SiteRecorder(None, in_guide)
        with ExitStack() as stack:
            handler = stack.enter_context(LeafDraws(local_plate)) if leaves else None
            stack.enter_context(subsamples)
            if shared_globals is not None:
                stack.enter_context(shared_globals)
            try:
                model_trace, guide_trace = get_importance_trace(
                    "flat", max_plate_nesting, in_model(model), in_guide(guide), args, kwargs
                )
            except Exception as error:
                if handler is not None:
                    _refuse_without_inverse(handler.draws, error)
                raise
        model_traces.append(model_trace)
        guide_traces.append(guide_trace)
        draws += handler.draws if handler else []
        records |= _by_program(in_model, in_guide)
    return ParticleTraces(
        tuple(model_traces), tuple(guide_traces), num_particles, None, records, tuple(draws)
    )


def _by_program(
    in_model: SiteRecorder, in_guide: SiteRecorder
) -> dict[tuple[str, str], SiteRecord]:
    return {
        (program, name): record
        for program, recorder in (("model", in_model), ("guide", in_guide))
        for name, record in recorder.sites.items()
    }


def _refuse_without_inverse(draws: Sequence[Draw], error: Exception) -> None:
    """Raises if a leaf has no density because its distribution's transform has no inverse."""
    for draw in draws:
        try:
            with torch.no_grad():
                draw.fn.log_prob(draw.leaf.detach())
        except Exception:
            raise ValueError(
                f"Guide site '{draw.name}' has no density at a given value: expected a "
                f"distribution whose transforms have an inverse, got {draw.fn}. Use "
                "gradient='pathwise'."
            ) from error


def _runs_with_one_particle(
    model: Callable, guide: Callable, args: Sequence[Any], kwargs: dict[str, Any]
) -> bool:
    try:
        with poutine.block(), torch.no_grad():
            get_importance_trace("flat", float("inf"), model, guide, args, kwargs)
    except Exception:
        return False
    return True


def _cannot_vectorize(
    num_particles: int,
    particle_dim: int,
    in_guide: SiteRecorder,
    in_model: SiteRecorder,
    error: Exception,
) -> str:
    program, recorder = ("model", in_model) if in_model.sites else ("guide", in_guide)
    where = f"after its site '{list(recorder.sites)[-1]}'" if recorder.sites else "at its start"
    return (
        f"The {program} failed {where} with num_particles={num_particles} vectorised in a plate "
        f"at dim {particle_dim}, though it runs with one particle: expected code that takes an "
        "extra dim on the left of every sample. Index dims from the right, wrap convolutions in "
        "pyro_ext.nn.LeadingDims, correct max_plate_nesting (it is guessed in the first run of a "
        f"model and guide), or pass vectorize_particles=False.\n{type(error).__name__}: {error}"
    )
