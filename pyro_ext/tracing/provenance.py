"""The sites that depend on the draws in which the particles differ."""

from typing import Any

import torch
from pyro.infer.inspect import TrackProvenance
from pyro.infer.util import is_validation_enabled
from pyro.ops.provenance import detach_provenance, get_provenance
from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._random_states import kept_random_states
from pyro_ext.tracing.density_sites import DensitySite, plates_of
from pyro_ext.tracing.enumeration import is_enumerated
from pyro_ext.tracing.plates import Depends
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.run import ParticleTraces, SiteKey
from pyro_ext.tracing.shared_values import (
    SharedGlobals,
    SharedSubsamples,
    with_one_minibatch,
)
from pyro_ext.tracing.sites import has_particles, is_delta


class Dependence:
    """A record of the sites that depend on the particle, made once for each model and guide.

    If several particles run at once, the sites that depend on the particle have the particle dim.
    Otherwise model and guide run once on tensors that carry the names of the sites they come from
    (their provenance). Compiled code and writes into buffers lose the provenance but not the
    values. So the values are compared as well: between two runs and, if the particles run one after
    the other, between the particles. A site whose value differs depends on the particle.
    """

    def __init__(self) -> None:
        self.seen: set[SiteKey] = set()
        self.dependent: set[SiteKey] = set()

    def within(
        self,
        traces: ParticleTraces,
        programs: Programs,
        subsamples: SharedSubsamples | None,
        local_plate: str | None,
    ) -> Depends:
        """Return a function that decides whether a site depends on the particle.

        :param traces: the traces of the particles.
        :param programs: the model and guide of these traces.
        :param subsamples: the minibatch indices of these traces, if they are given.
        :param local_plate: the name of the plate whose sites are drawn once for each particle; None
            if all sites are.
        """
        by_particle = traces.density_sites
        shows = traces.particle_dim is not None and traces.num_particles > 1

        def depends(site: DensitySite) -> bool:
            key = site.key
            if shows and has_particles(site.node, local_plate):
                self.seen.add(key)
                found = traces.has_particle_dim(site)
                (self.dependent.add if found else self.dependent.discard)(key)
                return found
            if key not in self.seen:
                self._track(with_one_minibatch(programs, subsamples), local_plate)
                self.seen.add(key)
            if not self.dependent.isdisjoint(member.key for member in site.members):
                self.dependent.add(key)
            if key not in self.dependent and is_validation_enabled():
                same = [other for row in by_particle for other in row if other.key == key]
                if len(same) < len(by_particle) or not all(
                    is_same_up_to_rounding(other.log_prob, site.log_prob) for other in same
                ):
                    self.dependent.add(key)
            return key in self.dependent

        return depends

    def _track(self, programs: Programs, local_plate: str | None) -> None:
        """Add the dependent sites, found from a run with provenance and a second run."""
        if local_plate is not None:
            shared = SharedGlobals(local_plate)
            programs = programs.each_under(shared, shared)
        tracked, other = _two_runs(programs)
        latent = {
            name
            for name, site in tracked["guide"].iter_stochastic_nodes()
            if has_particles(site, local_plate)
        }
        for program, trace in tracked.items():
            site: Any
            for name, site in trace.nodes.items():
                if site["type"] != "sample" or site_is_subsample(site):
                    continue
                self.seen.add((program, name))
                # Latent sites that have particles are the source of the dependence.
                has_draw = not site["is_observed"] and not is_enumerated(site)
                if not (has_draw and has_particles(site, local_plate)) and (
                    _provenance(site) & latent or _differs(site, other[program].nodes.get(name))
                ):
                    self.dependent.add((program, name))


def is_same_up_to_rounding(x: Tensor, y: Tensor) -> bool:
    """Return whether two log-probabilities are equal up to rounding."""
    tolerance = torch.finfo(y.dtype).eps ** 0.5
    return x.shape == y.shape and torch.allclose(
        x, y, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def points_of(programs: Programs) -> list[str]:
    """Return the names of the Delta sites that have the same value at every run of the guide.

    :param programs: the model and guide, with the same minibatch at each run.
    """
    tracked, other = (run["guide"] for run in _two_runs(programs))
    names = []
    site: Any
    for name, site in tracked.iter_stochastic_nodes():
        again: Any = other.nodes.get(name)
        if again is None or not is_delta(site["fn"]) or _provenance(site) - {name}:
            continue
        if torch.equal(detach_provenance(site["value"]), again["value"]):
            names.append(name)
    return names


def draws_leave_plates(programs: Programs) -> bool:
    """Return whether a guide site outside of a plate depends on a draw inside of it.

    Elements of the plate then depend on each other through this site.
    """
    tracker = _TrackDraws()
    with kept_random_states():
        guide = programs.each_under(tracker, tracker).run()["guide"]
    sites: dict[str, Any] = dict(guide.iter_stochastic_nodes())
    return any(
        not plates_of(sites[name]) <= plates_of(site)
        for site in sites.values()
        for name in _provenance(site)
        if name in sites
    )


def _two_runs(programs: Programs) -> tuple[dict[str, Trace], dict[str, Trace]]:
    """Return the traces of a run on tensors with provenance, and of a second run without."""
    tracker = _TrackDraws()
    with kept_random_states():
        return programs.each_under(tracker, tracker).run(), programs.run()


class _TrackDraws(TrackProvenance):
    """A tracker that leaves parameters alone, because subsampled plates must recognise them."""

    def _pyro_post_param(self, msg: Message) -> None:
        pass


def _log_prob(site: Any) -> Tensor | None:
    try:
        return site["fn"].log_prob(site["value"])
    except NotImplementedError:  # a flow without an inverse, whose draw is no longer cached
        return None


def _provenance(site: Any) -> frozenset[str]:
    tensors = [x for x in (_log_prob(site), site["mask"], site["scale"]) if torch.is_tensor(x)]
    return frozenset().union(*map(get_provenance, tensors))


def _differs(site: Any, other: Any) -> bool:
    if other is None:
        return True
    x, y = _log_prob(site), _log_prob(other)
    if x is None or y is None:
        return False
    return not is_same_up_to_rounding(detach_provenance(x), y)
