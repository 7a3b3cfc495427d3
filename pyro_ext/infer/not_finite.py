from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from pyro_ext.infer.particles import Particles
from pyro_ext.infer.plates import density_sites


def raise_not_finite(what: str, value: float, particles: Particles) -> NoReturn:
    """Raises a ValueError that names the first site to blame for a NaN or infinite value.

    :param str what: the quantity, with the name of the estimator.
    :param float value: its value.
    :param Particles particles: where it came from.
    """
    if site := _first_site(particles, torch.isnan):
        cause = (
            f"the log-probability of site {site} is NaN; expected data, parameters and network "
            "outputs without NaN"
        )
    elif site := _first_site(particles, torch.isinf):
        cause = (
            f"the log-probability of site {site} is infinite in too many particles; expected "
            "values inside the support that do not overflow"
        )
    else:
        cause = "the log-probability of every site is finite, the bound is not"
    raise ValueError(f"{what} is {value}: {cause}.")


def _first_site(particles: Particles, is_bad: Callable[[Tensor], Tensor]) -> str | None:
    # The guide runs first: what is wrong there is a cause, not an effect.
    programs = (("guide", particles.guide_traces), ("model", particles.model_traces))
    for program, traces in programs:
        for trace in traces:
            for site in density_sites(program, trace):
                if is_bad(site.log_prob).any():
                    return f"'{site.name}' of the {program}"
    return None
