"""Sequential Monte Carlo from a guide and from the prior."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.annealing.cloud import Cloud
from pyro_ext.infer.annealing.compiled_slopes import chosen_slopes
from pyro_ext.infer.annealing.conditional_runs import conditional_runs
from pyro_ext.infer.annealing.flags import has_less
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.posterior_draws import DrawnGuide, PosteriorDraws
from pyro_ext.infer.annealing.tempered_evidence import TemperedEvidence
from pyro_ext.infer.annealing.tempered_runs import StageStatistics, TemperedRuns
from pyro_ext.infer.annealing.unconstrained import UnconstrainedPrograms
from pyro_ext.infer.evidence.block_state import BlockState
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.ops import log_mean_exp
from pyro_ext.tracing import Programs

#: The number of runs that find the settings.
NUM_PILOT_RUNS = 4
#: The error of runs from the guide, relative to that of runs from the prior, above which the result
#: comes from the prior.
MAX_RATIO = 0.5
#: The number of standard errors by which the prior's runs may find more, if the result comes from
#: the guide's, and the number above which the prior has as many runs again for this decision.
MAX_GAIN, DOUBTFUL_GAIN = 2.0, 0.5

Result = tuple[Cloud, list[StageStatistics]]


@dataclass
class TemperedSampler:
    """A sampler of posteriors with one set of settings.

    :ivar owner: the name of the calling function, for messages.
    :ivar call: the call, which divides the runs over the processes.
    :ivar bar: a progress bar, which counts transitions.

    The others are arguments of :func:`~pyro_ext.infer.sequential_monte_carlo`.
    """

    owner: str
    call: JointCall
    bar: "tqdm[Any]"
    chunk_size: int
    max_plate_nesting: float
    compile: bool | str = False
    num_particles: int = 256
    num_runs: int = 16
    chain_length: int = 8
    target_ess: float = 0.8
    target_acceptance: float = 0.8
    check_prior: bool = True

    def posterior(
        self, programs: Programs, exact_sample: dict[str, Tensor] | None
    ) -> PosteriorDraws:
        """Return draws from the posterior, with the evidence.

        :param exact_sample: for an estimate from above, a dict from the name of a site to its value
            in a sample from the posterior.
        """
        runs = self._runs(programs)
        if exact_sample is not None:
            runs.target.draw(1, exact_sample)  # here, so that a bad sample costs no time
        pilot = runs.adapt(NUM_PILOT_RUNS)
        from_prior = self.adapted_from_prior(programs) if self.check_prior else None
        self.call.check_parameters(programs)
        self.call.use_own_random_numbers()
        if not self.bar.disable:
            both = [runs] if from_prior is None else [runs, from_prior]
            num_conditional = 0 if exact_sample is None else 2 * runs.num_transitions
            self.bar.total = self.bar.n + sum(x.num_transitions for x in both) + num_conditional
        found = None
        with self._ended_by_interrupt(
            f"The result uses the {NUM_PILOT_RUNS} runs of the first pass."
        ):
            found = _to_draws(runs, self._all_runs(runs.run))
        if found is None:
            return _to_draws(runs, [pilot])
        other = None if from_prior is None else self.finished(from_prior, found)
        found = found if other is None else _better(found, other)
        if exact_sample is None:
            return found
        upper = self._upper(runs, exact_sample)
        return replace(found, evidence=replace(found.evidence, upper=upper))

    def finished(
        self, from_prior: TemperedRuns, from_guide: PosteriorDraws | None = None
    ) -> PosteriorDraws | None:
        """Return the draws of runs from the prior; None after an interrupt.

        :param from_prior: the sampler of the runs.
        :param from_guide: the draws with which they are compared. In doubt, there are twice as many
            runs.
        """
        with self._ended_by_interrupt("The prior was not compared."):
            results = self._all_runs(from_prior.run)
            found = _to_draws(from_prior, results)
            if from_guide is not None and _is_doubtful(from_guide.evidence, found.evidence):
                found = _to_draws(from_prior, results + self._all_runs(from_prior.run))
            return found
        return None

    def _runs(self, programs: Programs) -> TemperedRuns:
        densities = UnconstrainedPrograms(self.owner, programs, self.max_plate_nesting)
        return TemperedRuns(
            FlatTarget(densities, self.chunk_size, chosen_slopes(self.owner, self.compile)),
            self.num_particles,
            self.chain_length,
            self.target_ess,
            self.target_acceptance,
            self.call,
            self.bar,
        )

    def adapted_from_prior(self, programs: Programs) -> TemperedRuns | None:
        """Return runs from the prior, with settings.

        :returns: the runs; None if the guide is the prior, or if the prior cannot be drawn from.
        """
        if _starts_at_prior(programs):
            return None
        runs = self._runs(replace(programs, guide=PriorProposal(programs.model)))
        try:
            runs.adapt(NUM_PILOT_RUNS)
        except (NotImplementedError, ValueError):  # such as an improper prior
            return None
        return runs

    def _upper(self, runs: TemperedRuns, exact_sample: dict[str, Tensor]) -> Tensor | None:
        """Return the estimate from above; None after an interrupt."""
        with self._ended_by_interrupt("The exact sample was not used."):
            found = self._all_runs(lambda size: (conditional_runs(runs, size, exact_sample), []))
            log_z = torch.cat([cloud.log_z for cloud, _ in found])
            return _outer(runs) - log_mean_exp(-log_z)
        return None

    @contextmanager
    def _ended_by_interrupt(self, consequence: str) -> Iterator[None]:
        """Warn of an interrupt, which ends the block, unless it is a second one."""
        try:
            yield
        except KeyboardInterrupt:
            if self.call.interrupts:
                raise
            warnings.warn(f"{self.owner} was interrupted. {consequence}", stacklevel=5)

    def _all_runs(self, run: Callable[[int], Result]) -> list[Result]:
        results: list[Result] = []
        done = 0
        while done < self.num_runs:
            sizes = self.call.share(self.num_runs - done, self.num_runs)
            for found in self.call.parts(run(size) for size in sizes):
                results.append(found)
                done += len(found[0].log_z)
        return results


def _starts_at_prior(programs: Programs) -> bool:
    return isinstance(poutine.unwrap(programs.guide), PriorProposal)


def _better(from_guide: PosteriorDraws, from_prior: PosteriorDraws) -> PosteriorDraws:
    """Return the result that is clearly less at fewer data points.

    Without such a difference, it is that of the prior, unless the guide's has a much smaller error
    and hardly less evidence.
    """
    guide, prior = from_guide.evidence, from_prior.evidence
    clearly = has_less(guide, prior).sum() - has_less(prior, guide).sum()
    is_worse = not _is_precise(guide, prior) or _gain(guide, prior) > MAX_GAIN
    if clearly > 0 or (clearly == 0 and is_worse):
        return replace(from_prior, evidence=replace(prior, other=guide))
    return replace(from_guide, evidence=replace(guide, other=prior))


def _is_precise(guide: Evidence, prior: Evidence) -> bool:
    # Few of a guide's draws may reach a part of the posterior, and its error is then too small.
    return bool(guide.std_error.norm() <= MAX_RATIO * prior.std_error.norm())


def _is_doubtful(guide: Evidence, prior: Evidence) -> bool:
    return _is_precise(guide, prior) and DOUBTFUL_GAIN < _gain(guide, prior) <= MAX_GAIN


def _gain(guide: Evidence, prior: Evidence) -> float:
    """Return by how much the prior's runs find more, in standard errors."""
    error = torch.hypot(guide.std_error.norm(), prior.std_error.norm())
    return float((prior.log_evidence - guide.log_evidence).sum() / error)


def _to_evidence(runs: TemperedRuns, results: list[Result]) -> TemperedEvidence:
    programs = runs.target.programs
    names = tuple(plate.name for plate in programs.plates)
    block = BlockState(names, 0, programs.outer)
    log_z = torch.cat([cloud.log_z for cloud, _ in results])
    block.add(log_z, (), len(log_z), 0, {})

    def joined(name: str) -> Tensor:
        by_stage = zip(*([getattr(x, name) for x in found] for _, found in results), strict=True)
        return torch.stack([torch.cat(parts) for parts in by_stage])

    return TemperedEvidence(
        **vars(block.to_evidence(())),
        num_particles=runs.num_particles,
        by_run=log_z + _outer(runs),
        temperatures=torch.stack([stage.beta for stage in runs.stages]),
        run_ess=joined("ess"),
        acceptance=joined("acceptance"),
        num_ancestors=joined("num_ancestors"),
        start="prior" if _starts_at_prior(programs.programs) else "guide",
        other=None,
        upper=None,
    )


def _outer(runs: TemperedRuns) -> Tensor | float:
    """Return the terms outside of the common plates that belong to the evidence of a run."""
    programs = runs.target.programs
    return 0.0 if programs.plates else programs.outer


def _to_draws(runs: TemperedRuns, results: list[Result]) -> PosteriorDraws:
    evidence, target = _to_evidence(runs, results), runs.target
    positions = torch.cat([cloud.state.positions for cloud, _ in results])
    shape = (len(evidence.by_run), runs.num_particles)
    by_site = target.by_site(positions)
    guides = [
        DrawnGuide(
            target.programs.programs.guide,
            {name: x.reshape(*shape, *x.shape[1:])[run] for name, x in by_site.items()},
            -target.programs.particle_dim,
        )
        for run in range(len(evidence.by_run))
    ]
    draws = target.values(positions)
    return PosteriorDraws(
        evidence,
        {name: x.reshape(*shape, *x.shape[1:]) for name, x in draws.items()},
        tuple(guides),
    )
