"""Words for what went wrong with draws: which site, which data points."""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.density_sites import density_sites
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.provenance import points_of
from pyro_ext.tracing.shared_values import SharedSubsamples
from pyro_ext.tracing.sites import is_delta


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


def data_points(chosen: Tensor, offset: tuple[int, ...] = (), most: int = 5) -> str:
    """Names the data points that are chosen, for a message; empty if there is only one in all.

    :param tuple offset: what to add to their indices.
    """
    if chosen.dim() == 0:
        return ""
    shift = torch.tensor(offset or (0,) * chosen.dim(), device=chosen.device)
    rows = (chosen.nonzero() + shift).tolist()
    indices = [tuple(row) if len(row) > 1 else row[0] for row in rows]
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    of = f"{chosen.numel()} in this block" if any(offset) else chosen.numel()
    return f" for data points {indices[:most]}{more}, of {of}"


def warn_of_points(guide_trace: Trace, programs: Programs, subsamples: SharedSubsamples) -> None:
    """Warns of sites that a guide puts at one point.

    :param Trace guide_trace: a trace of the guide.
    :param Programs programs: the model and guide, which run again if there may be such a site.
    :param SharedSubsamples subsamples: the minibatch indices to use.
    """
    sites: list[Any] = list(dict(guide_trace.iter_stochastic_nodes()).values())
    if not any(is_delta(site["fn"]) for site in sites):
        return
    for name in points_of(programs.each_under(subsamples, subsamples)):
        warnings.warn(
            f"The guide puts site '{name}' at one point (Delta): expected a distribution. "
            "The weights are then densities at that point, and the result is no evidence.",
            stacklevel=5,
        )
