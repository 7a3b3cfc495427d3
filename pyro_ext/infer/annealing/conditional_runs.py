"""Runs of sequential Monte Carlo that pass through an exact sample, for an estimate from above."""

import torch
from torch import Tensor

from pyro_ext.infer.annealing.cloud import Cloud
from pyro_ext.infer.annealing.hmc import ChainState, choose
from pyro_ext.infer.annealing.tempered_runs import Stage, TemperedRuns


def conditional_runs(runs: TemperedRuns, num_runs: int, exact_sample: dict[str, Tensor]) -> Cloud:
    """Return the particles of runs in which an exact sample survives.

    In each run, the ancestors of the exact sample are found backwards, by the reversible
    transitions of their chains. All other particles are those of ordinary runs, given these
    ancestors. If the sample is a draw from the posterior, the estimates of the evidence have
    :math:`E \\hat Z^{-1} = p(x)^{-1}`.

    :param runs: the sampler, with settings.
    :param num_runs: the number of runs R.
    :param exact_sample: a dict from the name of a site to its value.

    Sources: Andrieu, Doucet and Holenstein (2010), Particle Markov Chain Monte Carlo Methods;
    Grosse, Ghahramani and Adams (2015), Sandwiching the Marginal Likelihood Using Bidirectional
    Monte Carlo.
    """
    state = ChainState(*runs.target.draw(num_runs, exact_sample))
    shape = state.densities.log_p.shape
    chains: list[tuple[Stage, list[ChainState], Tensor]] = []
    for stage in reversed(runs.stages[:-1]):  # particles at 1 have no influence on the evidence
        number = torch.randint(runs.chain_length, shape, device=state.positions.device)
        chain = _chain_through(runs, stage, state, number)
        chains.append((stage, chain, number))
        state = chain[0]._replace(slopes=None)
    cloud = runs.start(num_runs)
    index = torch.randint(runs.num_particles, shape, device=state.positions.device)
    cloud = cloud.replaced(state, index)
    beta = torch.zeros_like(cloud.log_z[0])
    for stage, chain, number in reversed(chains):
        cloud = cloud.reweighted(stage.beta - beta)
        beta = stage.beta
        offset, copy = cloud.keeping(runs.num_chains, index)
        cloud, _ = runs.grown(cloud.resampled(runs.num_chains, offset), stage, cloud.ess)
        for i, of_chain in enumerate(chain):
            cloud = cloud.replaced(of_chain, i * runs.num_chains + copy)
        index = number * runs.num_chains + copy
    return cloud.reweighted(1 - beta)


def _chain_through(
    runs: TemperedRuns, stage: Stage, state: ChainState, number: Tensor
) -> list[ChainState]:
    """Return the states of chains through a state.

    :param number: the number of the state in each chain, from 0, of shape ``(R, *common)``.
    """
    chain, current = [state], state
    for i in range(runs.chain_length - 1, 0, -1):
        current = choose(i <= number, runs.moved(current, stage, i)[0], current)
        chain.insert(0, current)
    current = state
    for i in range(1, runs.chain_length):
        current = choose(i > number, runs.moved(current, stage, i)[0], current)
        chain[i] = choose(i >= number, current, chain[i])
    return chain
