import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._random_states import random_states, set_random_states
from pyro_ext.tracing.advice import Advice
from pyro_ext.tracing.density_sites import DensitySite, plates_of
from pyro_ext.tracing.enumeration import NeedsEnumerationError
from pyro_ext.tracing.explanations import explained
from pyro_ext.tracing.gather import gather_particles
from pyro_ext.tracing.leaves import Leaves
from pyro_ext.tracing.matching import SiteRecorder, raise_for_handlers_of_linear_objectives
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.plates import (
    check_local_plate,
    check_subsampling,
    find_common_plates,
    warn_of_joint_weights,
)
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.proposal import with_proposal
from pyro_ext.tracing.provenance import Dependence, draws_leave_plates
from pyro_ext.tracing.rewards import score_sites
from pyro_ext.tracing.run import ParticleTraces, run_at_once, run_in_turn
from pyro_ext.tracing.shared_values import SharedSubsamples, with_one_minibatch
from pyro_ext.tracing.sites import SiteError, lies_in
from pyro_ext.tracing.vectorization_check import check_vectorization


@dataclass
class TracerMemory:
    """The facts known about the model and guide that were traced last."""

    pair: Programs | None = None
    plate_nesting: int | None = None
    #: Whether the model has sites that are marked for enumeration and not in the guide; None
    #: before the first run.
    enumerates: bool | None = None
    #: The ELBO that sums over the guide, if the guide has marked sites and one particle is used.
    trace_enum_elbo: Any = None
    dependence: Dependence = field(default_factory=Dependence)
    is_checked: bool = False
    is_checked_for_nan: bool = False
    leaves_plates: bool | None = None
    warned_plates: set[str] = field(default_factory=set)

    def recall(self, programs: Programs) -> "TracerMemory":
        """Return the memory, emptied first if it is about another model or guide."""
        if not programs.is_same_pair(self.pair):
            self.__dict__ |= vars(TracerMemory(programs.without_arguments))
        return self


@dataclass
class ParticleTracer:
    """A tracer that runs a model and a guide for K particles and computes their log weights.

    It is independent of the bound. Estimators, evidence, annealing and diagnostics all use it.

    :ivar num_particles: the number of particles K.
    :ivar vectorize: whether the particles run at once, in a plate to the left of all others. A
        single particle runs without this plate unless ``has_dim_for_one`` is True.
    :ivar max_plate_nesting: the number of nested plates. With infinity, one run of each new model
        and guide finds it.
    :ivar local_plate: the name of a plate. Only the sites in it are drawn once for each
        particle. With None, all sites are.
    :ivar is_linear: whether the objective is linear in the log weights. If so, any plate may be
        subsampled.
    :ivar splits_rewards: whether to split the rewards of non-reparameterised sites by their plates
        if the objective is linear.
    :ivar is_proposal: whether the guide counts only with the density of its draws. An ELBO also
        counts the sites that the guide observes.
    :ivar has_loose_weights: whether one weight for all data of a plate makes the result worse.
    :ivar has_dim_for_one: whether a single particle also has the particle dim.
    :ivar num_draws: the number of draws of each guide site, combined in all ways, for a single
        particle; None for one draw.
    :ivar advice: the advice of error messages.
    :ivar memory: the facts found about the model and guide.
    """

    num_particles: int = 2
    vectorize: bool = True
    max_plate_nesting: float = math.inf
    local_plate: str | None = None
    is_linear: bool = False
    splits_rewards: bool = True
    is_proposal: bool = False
    has_loose_weights: bool = True
    has_dim_for_one: bool = False
    num_draws: int | None = None
    advice: Advice = field(default_factory=Advice)
    memory: TracerMemory = field(default_factory=TracerMemory, repr=False)

    def run(
        self,
        programs: Programs,
        num_particles: int | None = None,
        subsamples: SharedSubsamples | None = None,
        leaves: Leaves = Leaves.NOWHERE,
    ) -> ParticleTraces:
        """Return the traces of K particles.

        :param programs: the model and guide.
        :param num_particles: the number of particles, instead of the tracer's own.
        :param subsamples: the minibatch indices to use, or to record.
        :param leaves: the places where leaves replace the reparameterised draws.
        :raises ValueError: if sites do not match between model and guide, if a marked site cannot
            be summed out, or if model and guide cannot take the particle dim.
        """
        memory = self.memory.recall(programs)
        with explained(programs):
            states = random_states() if memory.enumerates is None else None
            memory.enumerates = bool(memory.enumerates)
            try:
                return self._run(programs, num_particles, subsamples, leaves)
            except NeedsEnumerationError:
                memory.enumerates = True
            if states is not None:
                set_random_states(states)
            return self._run(programs, num_particles, subsamples, leaves)

    def _run(
        self,
        programs: Programs,
        num_particles: int | None,
        subsamples: SharedSubsamples | None,
        leaves: Leaves,
    ) -> ParticleTraces:
        if not self.is_linear:
            raise_for_handlers_of_linear_objectives()
        K = self.num_particles if num_particles is None else num_particles
        nesting, enumerates = self.max_plate_nesting, bool(self.memory.enumerates)
        run: Any = partial(run_in_turn, num_draws=self.num_draws)
        if self.vectorize and (K > 1 or self.has_dim_for_one):
            run = run_at_once
        if run is run_at_once or enumerates or self.num_draws is not None:
            nesting = self.plate_nesting(programs, subsamples)
        return run(
            self._counted(programs),
            K,
            nesting,
            subsamples,
            self._local_plate,
            leaves,
            self.advice,
            enumerates,
        )

    def check(self, programs: Programs) -> None:
        """Raise a ValueError if a vectorised particle differs from the same particle run alone.

        :raises NotImplementedError: if the guide is a GuideMessenger, which runs the model.
        """
        if programs.guide_runs_model:
            raise NotImplementedError(
                "check does not support a GuideMessenger, because that guide runs the model. "
                f"To compare results, {self.advice.one_at_a_time}."
            )
        rows = SharedSubsamples()
        with poutine.block(), torch.no_grad():
            traces = self.run(programs, subsamples=rows)
        check_vectorization(
            traces, self._enumerated(programs), rows, self.advice.one_at_a_time, is_strict=True
        )

    def trace(
        self,
        programs: Programs,
        num_particles: int | None = None,
        subsamples: SharedSubsamples | None = None,
        leaves: Leaves = Leaves.NOWHERE,
    ) -> Particles:
        """Return K particles with their log weights.

        See :meth:`run` for the arguments and for other errors.

        :raises ValueError: if a subsampled plate would be part of the weights.
        """
        memory = self.memory.recall(programs)
        to_check = not memory.is_checked and is_validation_enabled()
        rows = SharedSubsamples() if to_check and subsamples is None else subsamples
        traces = self.run(programs, num_particles, rows, leaves)
        if self.num_draws is not None:
            _raise_for_score_sites(traces)
        local_plate = self._local_plate
        enumerated = self._enumerated(programs)
        depends = memory.dependence.within(traces, enumerated, subsamples, local_plate)
        by_particle = traces.density_sites
        sites = [site for row in by_particle for site in row]
        if local_plate is not None:
            check_local_plate(local_plate, by_particle[0], depends)
            sites = [site for site in sites if lies_in(site.node, local_plate)]
        common = find_common_plates(sites, depends)
        if not self.is_linear:
            check_subsampling(sites, common, depends, self.advice)
            if not common and self.has_loose_weights:
                warn_of_joint_weights(sites, memory.warned_plates)

        def is_outside(site: DensitySite) -> bool:
            if local_plate is not None and not lies_in(site.node, local_plate):
                return True
            return site.is_observed and not site.plates.issuperset(common) and not depends(site)

        outside = {site.key for row in by_particle for site in row if is_outside(site)}
        if to_check and rows is not None and traces.are_vectorized:
            # Handlers around the step would not reach a run of one particle.
            if not _has_foreign_handlers() and not programs.guide_runs_model:
                counted, remedy = self._counted(enumerated), self.advice.one_at_a_time
                check_vectorization(traces, counted, rows, remedy, is_strict=False)
            memory.is_checked = True
        splits_rewards = self.is_linear and self.splits_rewards
        if splits_rewards and any(score_sites(traces.guide_traces[0])):
            if memory.leaves_plates is None:
                memory.leaves_plates = draws_leave_plates(with_one_minibatch(programs, rows))
            splits_rewards = not memory.leaves_plates
        return gather_particles(traces, common, outside, local_plate, splits_rewards)

    def _enumerated(self, programs: Programs) -> Programs:
        """Return programs that enumerate along the dims of vectorised particles, if they do."""
        if not self.memory.enumerates:
            return programs
        return programs.enumerated(-2 - self.plate_nesting(programs))

    def _counted(self, programs: Programs) -> Programs:
        return with_proposal(programs) if self.is_proposal else programs

    @property
    def _local_plate(self) -> str | None:
        # The place of the particles makes no difference to a linear objective.
        return None if self.is_linear else self.local_plate

    def run_first(self, programs: Programs, subsamples: SharedSubsamples | None = None) -> int:
        """Run model and guide once, unless they have run, and return their number of nested plates.

        A first run may draw initial values of parameters.
        """
        memory = self.memory.recall(programs)
        if memory.plate_nesting is None:
            # A run is hidden from the handlers around it, so the handler goes inside.
            in_guide = SiteRecorder(None, self.advice)
            in_model = SiteRecorder(None, self.advice, in_guide, enumerates=True)
            recorded = programs.each_under(in_model, in_guide)
            with explained(programs):
                memory.plate_nesting = _guess_plate_nesting(
                    with_one_minibatch(recorded, subsamples)
                )
        return memory.plate_nesting

    def plate_nesting(self, programs: Programs, subsamples: SharedSubsamples | None = None) -> int:
        """Return the number of nested plates, found by a first run if it is not given."""
        if self.max_plate_nesting != math.inf:
            return int(self.max_plate_nesting)
        return self.run_first(programs, subsamples)


def _raise_for_score_sites(traces: ParticleTraces) -> None:
    for site, _ in score_sites(traces.guide_traces[0]):
        raise SiteError(
            f"Guide site '{site['name']}' is not reparameterised, so it has no pathwise gradient "
            "for combinations of draws. Take it out of the guide and mark it in the model with "
            "infer={'enumerate': 'parallel'}, which sums it out, or use ImportanceWeightedELBO."
        )


def _has_foreign_handlers() -> bool:
    """Return whether a step runs inside of effect handlers other than traces and our own."""
    return any(
        not isinstance(handler, TraceMessenger)
        and not type(handler).__module__.startswith("pyro_ext.")
        for handler in HANDLER_STACK
    )


@torch.no_grad()
def _guess_plate_nesting(programs: Programs) -> int:
    nodes = []
    for trace in programs.run().values():
        if is_validation_enabled():
            trace.compute_log_prob()
        nodes += [node for node in trace.nodes.values() if node["type"] == "sample"]
    depths = [0]
    for node in nodes:
        if site_is_subsample(node):
            continue
        if is_validation_enabled():
            check_site_shape(node, math.inf)  # type: ignore[arg-type]
        depths += [-(plate.dim or 0) for plate in plates_of(node)]
    return max(depths)
