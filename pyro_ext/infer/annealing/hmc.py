"""Transitions of many chains and data points at once, each accepted separately."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.infer.annealing.unconstrained import Densities, SingularDrawError


class ChainState(NamedTuple):
    """The positions of the chains, of shape ``(C, *common, D)``, and the densities there.

    :ivar slopes: the gradient of the annealed density, at the inverse temperature of the next
        transition; None if it is not known.
    """

    positions: Tensor
    densities: Densities
    slopes: Tensor | None = None


def transition(
    target: FlatTarget,
    state: ChainState,
    beta: float | Tensor,
    step_size: Tensor,
    metric: Metric,
    num_leapfrog_steps: int,
) -> tuple[ChainState, Tensor]:
    """Return the state after one transition, and the acceptance probabilities.

    The transition leaves p^beta q^(1 - beta) invariant.

    :param target: the densities.
    :param state: the state of C chains.
    :param beta: the inverse temperature, a number or a tensor of shape ``common``.
    :param step_size: the largest step size, for each element of the common plates.
    :param metric: the scale of the positions.
    :param num_leapfrog_steps: the number of leapfrog steps.
    :returns: the state, and probabilities of shape ``(C, *common)``.

    Source: Neal (2011), MCMC Using Hamiltonian Dynamics.
    """
    # Step sizes are random, because a path of fixed length may return to its start.
    step_size = step_size * (1 - 0.5 * torch.rand_like(state.densities.log_p))
    step = step_size.to(state.positions.dtype).unsqueeze(-1)
    start = momenta = torch.randn_like(state.positions)
    positions, slopes = state.positions, state.slopes
    if slopes is None:
        slopes = target.slopes(positions, beta)[1]
    first = slopes
    for _ in range(num_leapfrog_steps):
        momenta = momenta + 0.5 * step * metric.to_momenta(slopes)
        positions = positions + step * metric.to_positions(momenta)
        densities, slopes = target.slopes(positions, beta)
        momenta = momenta + 0.5 * step * metric.to_momenta(slopes)
    before = state.densities.annealed(beta) - start.square().sum(-1) / 2
    after = densities.annealed(beta) - momenta.square().sum(-1) / 2
    proposal = ChainState(positions, densities, slopes)
    return accept(state._replace(slopes=first), proposal, after - before)


def normal_transition(
    target: FlatTarget, state: ChainState, beta: float | Tensor, metric: Metric
) -> tuple[ChainState, Tensor]:
    """Return the state after an independent normal proposal, and the acceptance probabilities.

    The parameters are those of :func:`transition`.
    """
    unit = torch.randn_like(state.positions)
    positions = metric.center + metric.to_positions(unit)
    densities = target.densities(positions)
    before = state.densities.annealed(beta) + metric.to_unit(state.positions).square().sum(-1) / 2
    after = densities.annealed(beta) + unit.square().sum(-1) / 2
    return accept(state._replace(slopes=None), ChainState(positions, densities), after - before)


def guide_transition(
    target: FlatTarget, state: ChainState, beta: float | Tensor
) -> tuple[ChainState, Tensor]:
    """Return the state after a proposal from the guide, and the acceptance probabilities.

    The parameters are those of :func:`transition`.
    """
    try:
        proposal = ChainState(*target.draw(len(state.positions)))
    except SingularDrawError:  # does not depend on the chains, which stay where they are
        return state._replace(slopes=None), torch.zeros_like(state.densities.log_p)
    ratio = proposal.densities.log_w - state.densities.log_w
    return accept(state._replace(slopes=None), proposal, beta * ratio)


def accept(state: ChainState, proposal: ChainState, log_ratio: Tensor) -> tuple[ChainState, Tensor]:
    """Return the proposals where they are accepted, and the acceptance probabilities.

    :param state: the current state.
    :param proposal: the proposed state.
    :param log_ratio: the log of the Metropolis-Hastings ratio, of shape ``(C, *common)``. NaN means
        that a proposal has left the domain of the densities.
    """
    log_acceptance = log_ratio.nan_to_num(nan=-math.inf).clamp(max=0)
    accepted = torch.rand_like(log_acceptance).log() < log_acceptance
    return choose(accepted, proposal, state), log_acceptance.exp()


def choose(mask: Tensor, new: ChainState, old: ChainState) -> ChainState:
    """Return the new state where a mask of shape ``(C, *common)`` is true, and else the old one."""
    where = mask.unsqueeze(-1)
    slopes = None
    if new.slopes is not None and old.slopes is not None:
        slopes = torch.where(where, new.slopes, old.slopes)
    pairs = zip(new.densities, old.densities, strict=True)
    return ChainState(
        torch.where(where, new.positions, old.positions),
        Densities(*(torch.where(mask, *pair) for pair in pairs)),
        slopes,
    )
