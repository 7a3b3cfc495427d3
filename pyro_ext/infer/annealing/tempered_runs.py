"""Runs of sequential Monte Carlo from the guide to the posterior, with or without adaptation."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.annealing.cloud import Cloud, next_step
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.hmc import (
    ChainState,
    guide_transition,
    normal_transition,
    transition,
)
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.tracing.failures import data_points

#: The rate, per transition, at which step sizes follow the acceptance.
ADAPTATION_RATE = 1.0
#: The distance of the acceptance from its target at which step sizes are good, and the largest
#: number of transitions for it.
TOLERANCE, MAX_TUNING = 0.1, 8
#: The length of a leapfrog path, in standard deviations of the particles.
PATH_LENGTH = 1.5
MAX_LEAPFROG_STEPS = 8
#: The correlation of successive particles of a chain above which transitions are left out.
MAX_CORRELATION = 0.5
MAX_THINNING = 2
MAX_TEMPERATURES = 1000

#: Where independent proposals come from: the guide, or a normal distribution of the particles.
Source = Literal["guide", "normal"]
#: The cost of an independent proposal, in evaluations. A draw runs the guide as well.
EVALUATIONS: dict[Source, int] = {"guide": 2, "normal": 1}


class Stage(NamedTuple):
    """The settings of one inverse temperature.

    :ivar beta: the inverse temperature of each element of the common plates.
    :ivar metric: the scale of the positions.
    :ivar step_size: the largest step size of each element of the common plates.
    :ivar thinning: the number of Hamiltonian transitions between two particles of a chain.
    :ivar source: the source of the independent proposals that make all particles of a chain but
        two; None for Hamiltonian transitions.
    """

    beta: Tensor
    metric: Metric
    step_size: Tensor
    thinning: int = 1
    source: Source | None = None

    @property
    def num_leapfrog_steps(self) -> int:
        """The number of leapfrog steps of a path, whose steps are 3/4 of the largest on average."""
        num_steps = math.ceil(PATH_LENGTH / (0.75 * self.step_size.median().item()))
        return min(num_steps, MAX_LEAPFROG_STEPS)

    def source_of(self, number: int) -> Source | None:
        """Return the source of the particle with this number in a chain, from 1.

        Where independent proposals do not go, the first transition does.
        """
        return self.source if number > 1 else None

    def num_transitions(self, number: int) -> int:
        """Return the number of transitions that lead to the particle with this number."""
        return self.thinning if self.source_of(number) is None else 1


class StageStatistics(NamedTuple):
    """The statistics of runs at one inverse temperature.

    :ivar ess: the effective sample size before resampling, of shape ``(R, *common)``.
    :ivar num_ancestors: the number of first ancestors, of shape ``(R, *common)``.
    :ivar acceptance: the mean acceptance probability of each run, of shape ``(R, *common)``.
    """

    ess: Tensor
    num_ancestors: Tensor
    acceptance: Tensor


@dataclass
class TemperedRuns:
    """A sampler whose settings come from a first pass.

    The settings are fixed in later passes, so their estimates of the evidence are unbiased.

    :ivar target: the densities.
    :ivar num_particles: the number N of particles of a run, a multiple of the chain length.
    :ivar chain_length: the number P of particles in a chain.
    :ivar target_ess: the effective sample size of a step, relative to N.
    :ivar target_acceptance: the acceptance probability for which step sizes are chosen.
    :ivar call: the call, for interrupts.
    :ivar bar: a progress bar, which counts transitions.

    Source: Dau and Chopin (2022), Waste-Free Sequential Monte Carlo.
    """

    target: FlatTarget
    num_particles: int
    chain_length: int
    target_ess: float
    target_acceptance: float
    call: JointCall
    bar: "tqdm[Any]"
    stages: list[Stage] = field(default_factory=list)

    @property
    def num_chains(self) -> int:
        """The number of chains of a run."""
        return self.num_particles // self.chain_length

    @property
    def num_transitions(self) -> int:
        """The number of transitions of each particle in a later pass."""
        numbers = range(1, self.chain_length)
        return sum(stage.num_transitions(i) for stage in self.stages for i in numbers)

    def adapt(self, num_runs: int) -> tuple[Cloud, list[StageStatistics]]:
        """Find the settings, and return the particles of the runs that found them."""
        cloud = self.start(num_runs)
        found = []
        beta = torch.zeros_like(cloud.log_z[0])
        step_size = torch.ones_like(beta)
        while (beta < 1).any():
            if len(self.stages) == MAX_TEMPERATURES:
                raise ValueError(
                    f"{self.target.programs.owner}: more than {MAX_TEMPERATURES} inverse "
                    "temperatures are needed. Pass a guide that is closer to the posterior, or a "
                    "smaller target_ess."
                )
            step = next_step(cloud, beta, self.target_ess)
            beta = torch.where(step == 1 - beta, 1.0, beta + step)
            cloud = cloud.reweighted(step)
            weights = cloud.log_weights.flatten(0, 1).exp() / num_runs
            metric = Metric.of_cloud(cloud.state.positions, weights)
            ess, cloud = cloud.ess, cloud.resampled(self.num_chains)
            cloud, stage = self._tuned(cloud, Stage(beta, metric, step_size))
            step_size = stage.step_size
            self.stages.append(stage)
            cloud, statistics = self.grown(cloud, stage, ess)
            found.append(statistics)
        return cloud, found

    def run(self, num_runs: int) -> tuple[Cloud, list[StageStatistics]]:
        """Return the particles of some runs with their statistics."""
        cloud = self.start(num_runs)
        found = []
        beta = torch.zeros_like(cloud.log_z[0])
        for stage in self.stages:
            cloud = cloud.reweighted(stage.beta - beta)
            ess, beta = cloud.ess, stage.beta
            cloud, statistics = self.grown(cloud.resampled(self.num_chains), stage, ess)
            found.append(statistics)
        return cloud, found

    def start(self, num_runs: int) -> Cloud:
        """Return draws of the guide."""
        state = ChainState(*self.target.draw(num_runs * self.num_particles))
        cloud = Cloud.of_draws(state, num_runs)
        is_zero = cloud.log_ratio.isneginf().all(1).all(0)
        if is_zero.any():
            raise ValueError(
                f"{self.target.programs.owner}: all {len(state.positions)} draws of the guide, or "
                f"without a guide of the prior, have density zero{data_points(is_zero)}. They miss "
                "the values that the data allow. Use a guide that draws them, such as a wider one."
            )
        return cloud

    def _tuned(self, cloud: Cloud, stage: Stage) -> tuple[Cloud, Stage]:
        """Move particles until the settings are good, and return both."""
        state = cloud.state
        for _ in range(MAX_TUNING):
            start = state
            state, acceptance = self._moved(state, stage)
            error = acceptance.mean(0) - self.target_acceptance
            stage = stage._replace(step_size=stage.step_size * (ADAPTATION_RATE * error).exp())
            if error.abs().median() < TOLERANCE:
                break
        correlation = _correlation(start, state, stage.beta)
        if correlation > MAX_CORRELATION:
            # The correlation falls like a power of the number of transitions.
            wanted = math.log(MAX_CORRELATION) / math.log(min(correlation, 0.999))
            stage = stage._replace(thinning=min(math.ceil(wanted), MAX_THINNING))
        best, least = stage, float((1 + stage.num_leapfrog_steps) * stage.thinning)
        for source, evaluations in EVALUATIONS.items():
            state, acceptance = self._proposed(state, stage, source)
            cost = _cost(evaluations, acceptance)
            if cost < least:
                best, least = stage._replace(source=source), cost
        return cloud._replace(state=state), best

    def grown(self, cloud: Cloud, stage: Stage, ess: Tensor) -> tuple[Cloud, StageStatistics]:
        """Let a chain grow from each particle.

        :param cloud: the first particles of the chains.
        :param stage: the settings.
        :param ess: the effective sample size before they were resampled.
        :returns: the particles of all chains, and their statistics.
        """
        states, acceptances = [cloud.state], []
        for number in range(1, self.chain_length):
            state, of_transitions = self.moved(states[-1], stage, number)
            states.append(state)
            acceptances += of_transitions
        cloud = cloud.joined(states)
        mean = torch.stack(acceptances).mean(0)
        by_run = mean.reshape(len(cloud.log_z), -1, *mean.shape[1:]).mean(1)
        return cloud, StageStatistics(ess, cloud.num_ancestors, by_run)

    def moved(
        self, state: ChainState, stage: Stage, number: int
    ) -> tuple[ChainState, list[Tensor]]:
        """Return the next state of a chain, and the acceptances of Hamiltonian transitions.

        :param state: the state of the chains.
        :param stage: the settings.
        :param number: the number of the next particle, from 1. The transitions are reversible, so
            they lead back to the particle before this one as well.
        """
        source = stage.source_of(number)
        if source is not None:
            return self._proposed(state, stage, source)[0], []
        acceptances = []
        for _ in range(stage.thinning):
            state, acceptance = self._moved(state, stage)
            acceptances.append(acceptance)
        return state, acceptances

    def _moved(self, state: ChainState, stage: Stage) -> tuple[ChainState, Tensor]:
        """Return the state after a Hamiltonian transition, and the acceptance."""
        self.call.interrupts.deliver()
        self.bar.update()
        beta, steps = stage.beta.to(state.positions.dtype), stage.num_leapfrog_steps
        return transition(self.target, state, beta, stage.step_size, stage.metric, steps)

    def _proposed(
        self, state: ChainState, stage: Stage, source: Source
    ) -> tuple[ChainState, Tensor]:
        """Return the state after an independent proposal, and the acceptance."""
        self.call.interrupts.deliver()
        self.bar.update()
        beta = stage.beta.to(state.positions.dtype)
        if source == "guide":
            return guide_transition(self.target, state, beta)
        return normal_transition(self.target, state, beta, stage.metric)


def _cost(evaluations: int, acceptance: Tensor) -> float:
    """Return the evaluations for each independent draw. A rejection repeats a draw."""
    mean = max(acceptance.mean().item(), 1e-3)
    return evaluations * (2 - mean) / mean


def _correlation(start: ChainState, end: ChainState, beta: Tensor) -> float:
    """Return the largest correlation of a coordinate, or of the log density, at two times."""
    pair = []
    for state in (start, end):
        log_density = state.densities.annealed(beta.to(state.positions.dtype)).unsqueeze(-1)
        x = torch.cat([state.positions, log_density], -1)
        x = x.where(x.isfinite(), 0.0)
        x = x - x.mean(0)
        norm = x.square().sum(0).sqrt()
        pair.append(x / norm.where(norm > 0, 1.0))
    return (pair[0] * pair[1]).sum(0).abs().max().item()
