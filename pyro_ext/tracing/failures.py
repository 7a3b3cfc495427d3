"""Errors and warnings about draws that failed, with the sites and data points."""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext._arguments import abbreviate
from pyro_ext.tracing.density_sites import DensitySite, density_sites
from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.provenance import points_of
from pyro_ext.tracing.shared_values import SharedSubsamples, with_one_minibatch
from pyro_ext.tracing.sites import is_delta


def raise_not_finite(what: str, value: float, particles: Particles) -> NoReturn:
    """Raise a ValueError that names the first site to cause a NaN or infinite value.

    :param what: the name of the quantity, with the name of the estimator.
    :param value: the value of the quantity.
    :param particles: the particles from which it was computed.
    :raises ValueError: always.
    """
    if hidden := _hidden_nan(particles):
        cause = hidden
    elif site := _first_site(particles, torch.isnan):
        cause = (
            f"The log-probability of site {site} is NaN. Check the data, the parameters and the "
            "network outputs for NaN."
        )
    elif site := _first_site(particles, torch.isinf):
        cause = (
            f"The log-probability of site {site} is infinite in too many particles. Check that "
            "the guide draws inside the support of the model, and that nothing overflows."
        )
    else:
        cause = (
            "The log-probability of every site is finite, but the bound is not. Check the bound "
            "for overflow."
        )
    raise ValueError(f"{what} is {value}. {cause}")


def raise_for_hidden_nan(owner: str, particles: Particles) -> None:
    """Raise a ValueError if an observed site has NaN under its mask, and a gradient.

    :param owner: the name of the estimator, for the message.
    :param particles: the particles.
    """
    if cause := _hidden_nan(particles):
        raise ValueError(f"{owner}: the gradient is NaN. {cause}")


def _hidden_nan(particles: Particles) -> str | None:
    """Return a description of NaN under a mask, where the log-probability is zero."""
    for site in density_sites("model", particles.model_traces[0]):
        if not (site.is_observed and site.log_prob.requires_grad):
            continue
        is_nan = torch.as_tensor(site.node["value"]).isnan()
        for _ in range(site.node["fn"].event_dim):
            is_nan = is_nan.any(-1)
        if (is_nan & ~site.log_prob.isnan()).any():
            return (
                f"Site '{site.name}' of the model observes NaN under its mask, where its "
                "log-probability is masked out but not its gradient. Replace NaN in the data by "
                "any number of the support."
            )
    return None


def warn_of_single_draws(owner: str, error: Exception) -> None:
    """Warn that a function makes one draw at a time, because several at once have failed.

    :param owner: the name of the function.
    :param error: the error of several draws.
    """
    warnings.warn(
        f"{owner}: the programs cannot take several draws at once, so they run for one draw at a "
        "time, which takes longer. Pass chunk_size=1 if you mean this. With several draws: "
        f"{str(error).splitlines()[0].split('. ')[0]}.",
        stacklevel=6,
    )


def _first_site(particles: Particles, is_bad: Callable[[Tensor], Tensor]) -> str | None:
    # The guide runs first, so a bad value there is the cause of bad values in the model.
    sites = [site for row in particles.density_sites for site in row]
    for site in sorted(sites, key=lambda site: site.program):
        if is_bad(site.log_prob).any():
            culprit = next((m for m in site.members if is_bad(_over_values(m)).any()), site)
            return f"'{culprit.name}' of the {culprit.program}"
    return None


def _over_values(site: DensitySite) -> Tensor:
    """Return the log of the sum over the enumerated values; it is infinite if all of them are."""
    plates = {frame.dim for frame in site.node["cond_indep_stack"]}
    dims = [dim for dim in range(-site.log_prob.dim(), 0) if dim not in plates]
    return site.log_prob.logsumexp(dims, keepdim=True) if dims else site.log_prob


def data_points(chosen: Tensor, offset: tuple[int, ...] = (), most: int = 5) -> str:
    """Return the indices of the chosen data points, as a part of a message.

    It is empty if ``chosen`` has no dims, because there is only one data point.

    :param chosen: a boolean tensor with an entry for each data point.
    :param offset: the number to add to the indices along each dim.
    :param most: the largest number of indices to list.
    """
    if chosen.dim() == 0:
        return ""
    shift = torch.tensor(offset or (0,) * chosen.dim(), device=chosen.device)
    rows = (chosen.nonzero() + shift).tolist()
    indices = [tuple(row) if len(row) > 1 else row[0] for row in rows]
    of = f"{chosen.numel()} in this block" if any(offset) else chosen.numel()
    return f" for data points {abbreviate(indices, most)} (of {of})"


def warn_of_points(
    guide_trace: Trace, programs: Programs, subsamples: SharedSubsamples
) -> list[str]:
    """Warn about each guide site that always has the same value (a Delta).

    :param guide_trace: a trace of the guide.
    :param programs: the model and guide. They run again if the trace has a Delta site.
    :param subsamples: the minibatch indices to use.
    :returns: the names of these sites.
    """
    sites: list[Any] = list(dict(guide_trace.iter_stochastic_nodes()).values())
    if not any(is_delta(site["fn"]) for site in sites):
        return []
    names = points_of(with_one_minibatch(programs, subsamples))
    for name in names:
        warnings.warn(
            f"The guide puts site '{name}' at one point (Delta). The weights are then densities at "
            "that point, and the estimate is not valid. Use a guide that samples the site.",
            stacklevel=5,
        )
    return names
