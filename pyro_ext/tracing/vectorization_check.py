"""A check that a vectorised particle equals the same particle run alone."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext._random_states import kept_random_states, random_states, set_random_states
from pyro_ext.tracing.density_sites import density_sites
from pyro_ext.tracing.enumeration import is_enumerated, marginal_sites
from pyro_ext.tracing.module_calls import kept_buffers
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.provenance import is_same_up_to_rounding
from pyro_ext.tracing.run import ParticleTraces, SiteKey
from pyro_ext.tracing.shared_values import SharedSubsamples
from pyro_ext.tracing.sites import SiteError, is_delta, is_untraced

_PARTICLE = 1  # neither the first nor the last of three or more
_NUDGE = 8  # in units of the rounding error
_NUM_RUNS = 10  # to tell whether a program is random, also if it has few outcomes
_MARGIN = 30  # by which a difference must exceed the one that a nudge makes


@torch.no_grad()
def check_vectorization(
    traces: ParticleTraces,
    programs: Programs,
    subsamples: SharedSubsamples,
    remedy: str,
    is_strict: bool,
) -> None:
    """Raise a ValueError if a vectorised particle differs from the same particle run alone.

    The second particle is scored again alone, and compared site by site. Random states and the
    buffers of modules keep their values.

    :param traces: the traces of particles that ran at once.
    :param programs: the model and guide of these traces.
    :param subsamples: the minibatch indices of these traces.
    :param remedy: the advice of error messages for running one particle at a time.
    :param is_strict: whether a program that is random for given draws, as by dropout, is an error
        too. Otherwise such a program passes, because nothing can be compared.
    :raises ValueError: if a log-probability differs by more than the square root of its dtype's
        rounding error, and by more than a nudge of the draws explains. The message names the first
        such site.
    """
    with poutine.block(), kept_random_states(), kept_buffers():
        start = random_states()
        try:
            alone = _densities_alone(traces, programs, subsamples)
        except Exception as error:
            if is_strict:
                raise SiteError(
                    f"A particle cannot run alone, so nothing can be compared: {error}"
                ) from error
            return
        different = [key for key, x in alone.items() if _differs(_found(traces, key), x)]
        if not different:
            return
        for key in different:
            _check_size(key, _found(traces, key), alone[key], remedy)
        again = [_densities_alone(traces, programs, subsamples) for _ in range(_NUM_RUNS)]
        set_random_states(start)
        try:
            nudged = _densities_alone(traces, programs, subsamples, _NUDGE)
        except ValueError:  # a nudge over the edge of a support
            nudged = alone
    for key in different:
        if any(_differs(run[key], alone[key]) for run in again if key in run):
            if is_strict:
                raise SiteError(
                    f"{_name(key)} has another log-probability at each run with the same draws. "
                    "It is random (dropout), so nothing can be compared. Put modules in "
                    "evaluation mode for the check."
                )
            return
    for key in different:
        found, expected = _found(traces, key).reshape(alone[key].shape), alone[key]
        if _distance(found, expected) > _MARGIN * _distance(nudged[key], expected):
            raise SiteError(
                f"{_name(key)} has another log-probability in a vectorised particle than in the "
                f"same particle alone (sums: {found.sum().item():.6g} and "
                f"{expected.sum().item():.6g}). The program mixes particles: by BatchNorm in "
                "training mode, or by a mean, softmax or reshape over the particle dim. Count dims "
                f"from the right, put BatchNorm in evaluation mode, or {remedy}."
            )


def _densities_alone(
    traces: ParticleTraces, programs: Programs, subsamples: SharedSubsamples, nudge: int = 0
) -> dict[SiteKey, Tensor]:
    """Return the log-probabilities of the second particle, run alone."""
    with subsamples:
        particle = _OneParticle(traces, nudge)
        guide = poutine.trace(particle(programs.guide)).get_trace(*programs.args, **programs.kwargs)
        model = poutine.trace(poutine.replay(programs.model, guide)).get_trace(
            *programs.args, **programs.kwargs
        )
    known = {site.key for site in traces.sites_by_draw}
    return {
        key: log_prob
        for program, trace in (("model", model), ("guide", guide))
        for key, log_prob in _densities(program, trace)
        if key in known
    }


def _densities(program: str, trace: Trace) -> Iterator[tuple[SiteKey, Tensor]]:
    sites = density_sites(program, trace)
    if any(is_enumerated(site.node) for site in sites):
        trace.compute_log_prob()
        sites = marginal_sites(trace, sites)
    for site in sites:
        if site.members:
            yield site.key, site.log_prob
            continue
        fn, value = site.node["fn"], site.node["value"]
        try:
            log_prob = fn.log_prob(value)
        except (NotImplementedError, KeyError):  # a flow without an inverse
            continue
        if isinstance(log_prob, Tensor):  # unlike that of a subsample site
            yield site.key, scale_and_mask(log_prob, site.node["scale"], site.node["mask"])


def _found(traces: ParticleTraces, key: SiteKey) -> Tensor:
    (site,) = (site for site in traces.sites_by_draw if site.key == key)
    return traces.one_particle(site.log_prob, index=_PARTICLE)


class _OneParticle(Messenger):
    """A handler that gives the draws of a guide the values of the second vectorised particle.

    A Delta site is left alone, because it is a function of earlier draws.
    """

    def __init__(self, traces: ParticleTraces, nudge: int) -> None:
        super().__init__()
        self.traces = traces
        self.nudge = nudge

    def _pyro_sample(self, msg: Message) -> None:
        fn: Any = msg["fn"]
        node: Any = self.traces.guide_traces[0].nodes.get(str(msg["name"]))
        if node is None or msg["value"] is not None or is_untraced(msg) or is_delta(fn):
            return
        value = self.traces.one_particle(node["value"], fn.event_dim, index=_PARTICLE)
        if self.nudge and getattr(fn, "has_rsample", False):
            signs = torch.randint_like(value, 2) * 2 - 1
            value = value * (1 + self.nudge * torch.finfo(value.dtype).eps * signs)
        shape = fn.batch_shape + fn.event_shape
        msg["value"] = value.reshape(shape) if value.numel() == shape.numel() else value
        msg["done"] = True


def _differs(found: Tensor, expected: Tensor) -> bool:
    if found.numel() != expected.numel():
        return True
    return not is_same_up_to_rounding(found.reshape(expected.shape), expected)


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().nan_to_num(torch.inf, posinf=torch.inf).max())


def _check_size(key: SiteKey, found: Tensor, expected: Tensor, remedy: str) -> None:
    if found.numel() != expected.numel():
        raise SiteError(
            f"{_name(key)} has a log-probability of shape {tuple(found.shape)} in a vectorised "
            f"particle, but of shape {tuple(expected.shape)} in the same particle alone. Index "
            f"dims from the right, or {remedy}."
        )


def _name(key: SiteKey) -> str:
    return f"Site '{key[1]}' of the {key[0]}"
