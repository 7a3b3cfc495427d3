"""Runs of sequential Monte Carlo from the guide to the posterior, with or without adaptation."""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.annealing.cloud import Cloud, next_step
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.hmc import ChainState, independent_transition, transition
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.tracing.failures import data_points

#: The rate, per transition, at which step sizes follow the acceptance.
ADAPTATION_RATE = 1.0
#: The length of a leapfrog path, in standard deviations of the particles.
PATH_LENGTH = 1.5
MAX_LEAPFROG_STEPS = 8
#: The correlation of successive particles of a chain above which transitions are left out.
MAX_CORRELATION = 0.5
MAX_THINNING = 2
MAX_TEMPERATURES = 1000


class Stage(NamedTuple):
    """The settings of one inverse temperature.

    :ivar beta: the inverse temperature of each element of the common plates.
    :ivar step: the difference from the one before.
    :ivar metric: the scale of the positions.
    :ivar step_size: the largest step size of each element of the common plates.
    :ivar num_leapfrog_steps: the number of leapfrog steps of a transition.
    :ivar thinning: the number of Hamiltonian transitions between two particles of a chain.
    :ivar is_independent: whether independent proposals make all particles of a chain but two.
    """

    beta: Tensor
    step: Tensor
    metric: Metric
    step_size: Tensor
    num_leapfrog_steps: int
    thinning: int = 1
    is_independent: bool = False


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

    def adapt(self, num_runs: int) -> tuple[Cloud, list[StageStatistics]]:
        """Find the settings, and return the particles of the runs that found them."""
        cloud = self._start(num_runs)
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
            stage = Stage(beta, step, metric, step_size, _path_steps(step_size))
            cloud, statistics, stage = self._grown(cloud, stage, adapts=True)
            step_size = stage.step_size
            self.stages.append(stage)
            found.append(statistics)
        return cloud, found

    def run(self, num_runs: int) -> tuple[Cloud, list[StageStatistics]]:
        """Return the particles of some runs with their statistics."""
        cloud = self._start(num_runs)
        found = []
        for stage in self.stages:
            cloud, statistics, _ = self._grown(cloud.reweighted(stage.step), stage)
            found.append(statistics)
        return cloud, found

    def _start(self, num_runs: int) -> Cloud:
        state = ChainState(*self.target.draw(num_runs * self.num_particles))
        cloud = Cloud.of_draws(state, num_runs)
        is_zero = cloud.log_ratio.isneginf().all(1).all(0)
        if is_zero.any():
            raise ValueError(
                f"{self.target.programs.owner}: all {len(state.positions)} draws of the guide have "
                f"density zero{data_points(is_zero)}. The support of the guide misses the values "
                "that the data allow. Use a guide that draws them, such as a wider one."
            )
        return cloud

    def _grown(
        self, cloud: Cloud, stage: Stage, adapts: bool = False
    ) -> tuple[Cloud, StageStatistics, Stage]:
        """Resample particles, and let a chain grow from each.

        :param cloud: the weighted particles.
        :param stage: the settings.
        :param adapts: whether to adapt the settings.
        :returns: the particles of all chains, their statistics and the settings.
        """
        ess = cloud.ess
        cloud = cloud.resampled(self.num_particles // self.chain_length)
        beta = stage.beta.to(cloud.state.positions.dtype)
        state, states, acceptances = cloud.state, [cloud.state], []
        while len(states) < self.chain_length:
            self.call.interrupts.deliver()
            is_second = len(states) == 2
            if len(states) > 1 and (stage.is_independent or (adapts and is_second)):
                state, acceptance = independent_transition(self.target, state, beta, stage.metric)
                self.bar.update()
                if adapts and is_second:
                    stage = stage._replace(is_independent=_is_cheap(acceptance, stage))
            else:
                count = 0
                while count < stage.thinning:
                    state, acceptance = transition(
                        self.target,
                        state,
                        beta,
                        stage.step_size,
                        stage.metric,
                        stage.num_leapfrog_steps,
                    )
                    self.bar.update()
                    count += 1
                    if adapts:
                        stage = self._tuned(stage, acceptance)
                        if len(states) == 1 and count < MAX_THINNING:
                            is_slow = _correlation(cloud.state, state, beta) > MAX_CORRELATION
                            stage = stage._replace(thinning=count + is_slow)
                acceptances.append(acceptance)
            states.append(state)
        cloud = cloud.joined(states)
        mean = torch.stack(acceptances).mean(0)
        by_run = mean.reshape(len(cloud.log_z), -1, *mean.shape[1:]).mean(1)
        return cloud, StageStatistics(ess, cloud.num_ancestors, by_run), stage

    def _tuned(self, stage: Stage, acceptance: Tensor) -> Stage:
        """Return settings whose acceptance is closer to the target."""
        error = acceptance.mean(0) - self.target_acceptance
        step_size = stage.step_size * (ADAPTATION_RATE * error).exp()
        return stage._replace(step_size=step_size, num_leapfrog_steps=_path_steps(step_size))


def _path_steps(step_size: Tensor) -> int:
    """Return the number of leapfrog steps of a path, whose steps are 3/4 of the largest."""
    num_steps = math.ceil(PATH_LENGTH / (0.75 * step_size.median().item()))
    return min(num_steps, MAX_LEAPFROG_STEPS)


def _is_cheap(acceptance: Tensor, stage: Stage) -> bool:
    """Return whether independent proposals cost less than Hamiltonian transitions.

    The cost is the number of evaluations, divided by the effective number of draws that the
    correlation leaves. A rejection repeats a draw.
    """
    mean = acceptance.mean().item()
    return 2 - mean < mean * (1 + stage.num_leapfrog_steps) * stage.thinning


def _correlation(start: ChainState, end: ChainState, beta: Tensor) -> float:
    """Return the largest correlation of a coordinate, or of the log density, at two times."""
    pair = []
    for state in (start, end):
        log_density = state.densities.annealed(beta).unsqueeze(-1)
        x = torch.cat([state.positions, log_density], -1)
        x = x.where(x.isfinite(), 0.0)
        x = x - x.mean(0)
        norm = x.square().sum(0).sqrt()
        pair.append(x / norm.where(norm > 0, 1.0))
    return (pair[0] * pair[1]).sum(0).abs().max().item()
