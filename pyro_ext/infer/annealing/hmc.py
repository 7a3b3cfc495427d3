"""Hamiltonian Monte Carlo for many chains and data points at once, each accepted separately."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext.infer.annealing.compiled_slopes import Slopes
from pyro_ext.infer.annealing.slopes import slopes_at
from pyro_ext.infer.annealing.unconstrained import Densities, UnconstrainedPrograms


class ChainState(NamedTuple):
    """The positions of the chains, and the densities there."""

    positions: dict[str, Tensor]
    densities: Densities


def transition(
    programs: UnconstrainedPrograms,
    state: ChainState,
    beta: float,
    step_size: Tensor,
    scales: dict[str, Tensor],
    num_leapfrog_steps: int,
    slopes_of: Slopes = slopes_at,
) -> tuple[ChainState, Tensor]:
    """Return the state after one transition, and the acceptance probabilities.

    The transition leaves p^beta q^(1 - beta) invariant.

    :param programs: the densities.
    :param state: the state of C chains.
    :param beta: the inverse temperature.
    :param step_size: the largest step size, for each element of the common plates.
    :param scales: a dict from site name to the factors of the step sizes.
    :param num_leapfrog_steps: the number of leapfrog steps.
    :param slopes_of: the function that computes densities and gradients.
    :returns: the state, and probabilities of shape ``(C, *common)``.

    Source: Neal (2011), MCMC Using Hamiltonian Dynamics.
    """
    # Step sizes are random, because a path of fixed length may return to its start.
    step_size = step_size * (1 - 0.5 * torch.rand_like(state.densities.log_p))
    steps = {
        name: scales[name] * programs.expand(step_size, position)
        for name, position in state.positions.items()
    }
    start = {name: torch.randn_like(position) for name, position in state.positions.items()}
    momenta, positions = start, state.positions
    slopes = slopes_of(programs, positions, beta)[1]
    for _ in range(num_leapfrog_steps):
        momenta = {name: p + 0.5 * steps[name] * slopes[name] for name, p in momenta.items()}
        positions = {name: u + steps[name] * momenta[name] for name, u in positions.items()}
        densities, slopes = slopes_of(programs, positions, beta)
        momenta = {name: p + 0.5 * steps[name] * slopes[name] for name, p in momenta.items()}
    before = state.densities.annealed(beta) - _kinetic_energy(programs, start)
    after = densities.annealed(beta) - _kinetic_energy(programs, momenta)
    # NaN means that the path has left the domain of the densities: reject.
    log_acceptance = (after - before).nan_to_num(nan=-math.inf).clamp(max=0)
    accepted = torch.rand_like(log_acceptance).log() < log_acceptance
    positions = {
        name: torch.where(programs.expand(accepted, u), u, state.positions[name])
        for name, u in positions.items()
    }
    pairs = zip(densities, state.densities, strict=True)
    densities = Densities(*(torch.where(accepted, new, old) for new, old in pairs))
    return ChainState(positions, densities), log_acceptance.exp()


def _kinetic_energy(programs: UnconstrainedPrograms, momenta: dict[str, Tensor]) -> Tensor:
    terms = []
    for p in momenta.values():
        event_dims = list(range(-programs.num_event_dims(p), 0))
        squares = p.square() / 2
        terms.append(squares.sum(event_dims) if event_dims else squares)
    return programs.sum_out(terms, len(terms[0]))
