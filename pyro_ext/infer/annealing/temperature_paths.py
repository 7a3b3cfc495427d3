"""Paths of inverse temperatures, from 0 at the guide to 1 at the posterior."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from pyro_ext._arguments import abbreviate, describe


def inverse_temperatures(ladder: str | Sequence[float], num_temperatures: int) -> tuple[float, ...]:
    """Return the inverse temperatures of a named path, or the given ones after a check.

    :param ladder: ``"sigmoid"``, ``"geometric"``, or the inverse temperatures.
    :param num_temperatures: the number of steps of a named path.
    :raises TypeError: if the inverse temperatures are no numbers.
    :raises ValueError: if there is no path of that name, or if the numbers do not increase from 0
        to 1.
    """
    fractions = [t / num_temperatures for t in range(num_temperatures + 1)]
    if ladder == "sigmoid":
        # The logistic function from -4 to 4, stretched to reach 0 and 1.
        edge = math.tanh(2)
        return tuple((math.tanh(2 * (2 * t - 1)) / edge + 1) / 2 for t in fractions)
    if ladder == "geometric":
        # From 0.001 to 1 with a constant ratio.
        rest = num_temperatures - 1
        return (0.0, *(1000.0 ** (t / rest - 1) for t in range(rest)), 1.0)
    if isinstance(ladder, str) or not isinstance(ladder, Iterable):
        raise ValueError(
            "annealed_importance_sampling: ladder must be 'sigmoid', 'geometric' or a sequence of "
            f"inverse temperatures, but it is {describe(ladder)}."
        )
    try:
        betas = tuple(map(float, ladder))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"annealed_importance_sampling: ladder must hold numbers from 0 to 1 ({error})."
        ) from None
    is_rising = all(a < b for a, b in pairwise(betas))
    if len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or not is_rising:
        raise ValueError(
            "annealed_importance_sampling: ladder must increase from 0 to 1, but it is "
            f"{abbreviate(betas)}."
        )
    return betas
