"""The gradient of an annealed density at the positions of many chains."""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ext.infer.annealing.unconstrained import Densities, UnconstrainedPrograms

CHOLESKY = (torch.linalg.cholesky, torch.cholesky, Tensor.cholesky)
Found = tuple[Densities, dict[str, Tensor]]


def slopes_at(
    programs: UnconstrainedPrograms, positions: dict[str, Tensor], beta: float | Tensor
) -> tuple[Densities, dict[str, Tensor]]:
    """Return the densities, and the gradient of the annealed density by site name.

    :param programs: the densities.
    :param positions: a dict from site name to the unconstrained positions of C chains.
    :param beta: the inverse temperature. A tensor must broadcast against ``(C, *common)``.
    """

    def found(part: dict[str, Tensor]) -> Found:
        leaves = {name: u.detach().requires_grad_() for name, u in part.items()}
        with torch.enable_grad():
            densities = programs(leaves)
            # Chains and data points are independent, so one gradient of the sum holds all of them.
            slopes = torch.autograd.grad(densities.annealed(beta).sum(), list(leaves.values()))
        return Densities(*(x.detach() for x in densities)), dict(zip(leaves, slopes, strict=True))

    return _away_from_singular(found, programs, positions)


def densities_at(programs: UnconstrainedPrograms, positions: dict[str, Tensor]) -> Densities:
    """Return the densities at the positions of C chains."""
    return _away_from_singular(lambda part: (programs(part), {}), programs, positions)[0]


class _SingularIsNaN(TorchFunctionMode):
    """A mode in which the Cholesky factor of a singular matrix is NaN, and the others are right."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CHOLESKY:
            return func(*args, **(kwargs or {}))
        factor, info = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return factor.where((info == 0)[..., None, None], math.nan)


def _away_from_singular(
    function: Callable[[dict[str, Tensor]], Found],
    programs: UnconstrainedPrograms,
    positions: dict[str, Tensor],
) -> Found:
    """Return the result of a function, without a density for chains at a singular matrix.

    Their density is NaN, or zero if another operation than the Cholesky decomposition fails.
    """
    for context in (nullcontext(), _SingularIsNaN()):
        with suppress(torch.linalg.LinAlgError), context:
            return function(positions)
    num_chains = len(next(iter(positions.values())))
    if num_chains == 1:
        zero = programs.sum_out([next(iter(positions.values())).new_zeros(())], 1)
        densities = Densities(*[torch.full_like(zero, -math.inf)] * 3)
        return densities, {name: torch.zeros_like(u) for name, u in positions.items()}
    halves = [
        _away_from_singular(function, programs, {name: u[half] for name, u in positions.items()})
        for half in (slice(num_chains // 2), slice(num_chains // 2, None))
    ]
    densities = Densities(*map(torch.cat, zip(*(half[0] for half in halves), strict=True)))
    names = halves[0][1].keys() & halves[1][1].keys()
    return densities, {name: torch.cat([half[1][name] for half in halves]) for name in names}
