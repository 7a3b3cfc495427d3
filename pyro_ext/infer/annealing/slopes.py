"""The gradient of an annealed density at the positions of many chains."""

import math

import torch
from torch import Tensor

from pyro_ext.infer.annealing.unconstrained import Densities, UnconstrainedPrograms


def slopes_at(
    programs: UnconstrainedPrograms, positions: dict[str, Tensor], beta: float | Tensor
) -> tuple[Densities, dict[str, Tensor]]:
    """Return the densities, and the gradient of the annealed density by site name.

    :param programs: the densities.
    :param positions: a dict from site name to the unconstrained positions of C chains.
    :param beta: the inverse temperature. A tensor must broadcast against ``(C, *common)``.
    """
    leaves = {name: u.detach().requires_grad_() for name, u in positions.items()}
    try:
        with torch.enable_grad():
            densities = programs(leaves)
            # Chains and data points are independent, so one gradient of the sum holds all of them.
            slopes = torch.autograd.grad(densities.annealed(beta).sum(), list(leaves.values()))
    except Exception as error:
        if not isinstance(error.__cause__ or error, torch.linalg.LinAlgError):
            raise
        return _one_by_one(programs, positions, beta)
    return Densities(*(x.detach() for x in densities)), dict(zip(leaves, slopes, strict=True))


def _one_by_one(
    programs: UnconstrainedPrograms, positions: dict[str, Tensor], beta: float | Tensor
) -> tuple[Densities, dict[str, Tensor]]:
    """Return the result of :func:`slopes_at` if a chain is at a singular matrix.

    That chain has no density and stays where it is.
    """
    num_chains = len(next(iter(positions.values())))
    if num_chains == 1:
        zero = programs.sum_out([next(iter(positions.values())).new_zeros(())], 1)
        densities = Densities(*[torch.full_like(zero, -math.inf)] * 3)
        return densities, {name: torch.zeros_like(u) for name, u in positions.items()}
    rows = [
        slopes_at(programs, {name: u[i : i + 1] for name, u in positions.items()}, beta)
        for i in range(num_chains)
    ]
    densities = Densities(*map(torch.cat, zip(*(row[0] for row in rows), strict=True)))
    return densities, {name: torch.cat([row[1][name] for row in rows]) for name in positions}
