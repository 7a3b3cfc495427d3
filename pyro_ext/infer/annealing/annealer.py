import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.annealing.annealed_evidence import AnnealedEvidence
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.hmc import ChainState, transition
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.infer.annealing.tempered_sampler import TemperedSampler
from pyro_ext.infer.evidence.block_state import BlockState
from pyro_ext.ops import accumulation_dtype, log_mean_exp
from pyro_ext.tracing.failures import data_points

#: The rate, per transition, at which step sizes follow the acceptance.
ADAPTATION_RATE = 0.3
#: The number of transitions at the first temperature before step sizes are stored.
NUM_WARMUP = 20


@dataclass
class Annealer:
    """A runner of the chains, with step sizes from a first pass.

    An interrupt waits for the end of a transition.
    """

    target: FlatTarget
    betas: tuple[float, ...]
    num_leapfrog_steps: int
    target_acceptance: float
    call: JointCall
    bar: "tqdm[Any]"
    step_sizes: list[Tensor] = field(default_factory=list)

    def run(
        self,
        num_chains: int,
        chunk_size: int,
        orders: tuple[int, ...],
        exact_sample: dict[str, Tensor] | None,
        sampler: TemperedSampler,
        check_prior: bool,
    ) -> AnnealedEvidence:
        """Find the step sizes, and return the evidence, compared with that from the prior.

        :param sampler: the sampler of runs from the prior.
        :param check_prior: whether to compare.

        The others are parameters of :meth:`evidence`.
        """
        if exact_sample is not None:
            self.target.draw(1, exact_sample)  # here, so that a bad sample costs no time
        self.adapt(chunk_size)
        programs = self.target.programs.programs
        from_prior = sampler.adapted_from_prior(programs) if check_prior else None
        self.call.check_parameters(programs)
        self.call.use_own_random_numbers()
        found = self.evidence(num_chains, chunk_size, orders, exact_sample)
        if from_prior is None or found.num_samples < num_chains:
            return found
        draws = sampler.finished(from_prior)
        return found if draws is None else replace(found, from_prior=draws.evidence)

    def adapt(self, num_chains: int) -> None:
        """Find the step sizes, from chains that adapt them to their acceptance.

        :param num_chains: the number of these chains.
        """
        state = self._start(num_chains)
        self._metric = Metric.of_spread(state.positions)
        log_step = torch.full_like(state.densities.log_p[0], math.log(0.3))
        inner = self.betas[1:-1]
        for index, beta in enumerate(inner[:1] * NUM_WARMUP + inner):
            state, acceptance = self._step(state, beta, log_step.exp())
            log_step = log_step + ADAPTATION_RATE * (acceptance - self.target_acceptance)
            if index >= NUM_WARMUP:
                self.step_sizes.append(log_step.exp())

    def evidence(
        self,
        num_chains: int,
        chunk_size: int,
        orders: tuple[int, ...],
        exact_sample: dict[str, Tensor] | None,
    ) -> AnnealedEvidence:
        """Return the evidence of all chains, or of the complete chunks after an interrupt.

        :param num_chains: the number of chains C.
        :param chunk_size: the number of chains at once.
        :param orders: the orders of the jackknife.
        :param exact_sample: for reverse chains, a dict from the name of a site to its value in a
            sample from the posterior. With None, there are no reverse chains.
        """
        programs = self.target.programs
        names = tuple(plate.name for plate in programs.plates)
        block = BlockState(names, 0, programs.outer)
        acceptances, reverse = [], []
        try:
            while block.num_samples < num_chains:
                sizes = self.call.share(num_chains - block.num_samples, chunk_size)
                for log_w, acceptance, reverse_log_w in self.call.parts(
                    self._anneal_both_ways(size, exact_sample) for size in sizes
                ):
                    reverse += reverse_log_w
                    block.add(log_w, orders, num_chains, 0, {})
                    acceptances.append(acceptance)
        except KeyboardInterrupt:
            if self.call.interrupts or not acceptances:  # a second interrupt, or nothing to keep
                raise
            warnings.warn(
                f"{programs.owner} was interrupted. The result uses {block.num_samples} of "
                f"{num_chains} chains.",
                stacklevel=3,
            )
        evidence = block.to_evidence(orders)
        is_zero = evidence.log_evidence.isneginf()
        if is_zero.any():
            raise ValueError(
                f"{programs.owner}: all {evidence.num_samples} weights are "
                f"zero{data_points(is_zero)}. The support of the guide misses the values that the "
                "data allow. Use a guide that draws them, such as a wider one."
            )
        constant = 0.0 if names else programs.outer
        return AnnealedEvidence(
            **vars(evidence),
            temperatures=self.betas,
            acceptance=torch.stack(acceptances).mean(0),
            upper=constant - log_mean_exp(-torch.cat(reverse)) if reverse else None,
        )

    def _anneal_both_ways(
        self, num_chains: int, exact_sample: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return log weights, the mean acceptance, and the log weights of any reverse chains."""
        log_w, acceptance = self._anneal(num_chains)
        has_reverse = exact_sample is not None
        reverse = [self._anneal(num_chains, exact_sample)[0]] if has_reverse else []
        return log_w, acceptance, reverse

    def _anneal(
        self, num_chains: int, exact_sample: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the log weights, of shape ``(C, *common)``, and the mean acceptance.

        With an exact sample, the chains start there and run in reverse.
        """
        state = self._start(num_chains, exact_sample)
        log_w = torch.zeros_like(
            state.densities.log_p, dtype=accumulation_dtype(state.densities.log_p.device)
        )
        acceptances = [torch.full_like(log_w[0], math.nan)]
        last = len(self.betas) - 2
        for index in range(last + 1):
            t = index if exact_sample is None else last - index
            ratio = state.densities.log_w.to(log_w.dtype)
            log_w = log_w + (self.betas[t + 1] - self.betas[t]) * ratio
            if index < last:
                inner = t if exact_sample is None else t - 1
                step_size = self.step_sizes[inner]
                state, acceptance = self._step(state, self.betas[inner + 1], step_size)
                acceptances.append(acceptance.to(log_w.dtype))
        return log_w, torch.stack(acceptances).nanmean(0)

    def _start(self, num_chains: int, exact_sample: dict[str, Tensor] | None = None) -> ChainState:
        return ChainState(*self.target.draw(num_chains, exact_sample))

    def _step(self, state: ChainState, beta: float, step_size: Tensor) -> tuple[ChainState, Tensor]:
        self.call.interrupts.deliver()
        state, acceptance = transition(
            self.target, state, beta, step_size, self._metric, self.num_leapfrog_steps
        )
        self.bar.update()
        # The slopes belong to this inverse temperature.
        return state._replace(slopes=None), acceptance.mean(0)
