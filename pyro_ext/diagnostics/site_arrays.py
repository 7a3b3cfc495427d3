"""Values of a trace's sites as numpy arrays, with draws and named plates on the left."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.density_sites import plates_of
from pyro_ext.tracing.site_values import with_plates
from pyro_ext.tracing.sites import base_of, is_delta, is_deterministic, is_left_by_do, is_masked_out
from pyro_ext.tracing.user_scales import divided


class SiteArray(NamedTuple):
    """The values of a site: the names of its plates, and an array ``(draw, *plates, *event)``."""

    plates: tuple[str, ...]
    values: np.ndarray

    def sum_to(self, plates: Sequence[str]) -> np.ndarray:
        """Return the sum over all plates except the given ones."""
        axes = tuple(1 + i for i, name in enumerate(self.plates) if name not in plates)
        return self.values.sum(axes, dtype=np.float64)


#: The sites of each group, by the name of the group. Log-densities of sites have separate groups.
Groups = dict[str, dict[str, SiteArray]]

#: A function that returns whether to take a site.
Predicate = Callable[[Any], bool]

#: A function that returns a tensor without event dims for a site.
Reading = Callable[[Any], Tensor]


def site_arrays(
    trace: Trace,
    num_draws: int,
    rank: int,
    is_wanted: Predicate,
    read: Reading | None = None,
    constants: Collection[str] = (),
) -> dict[str, SiteArray]:
    """Return the arrays of some sites of a trace.

    :param trace: the trace.
    :param num_draws: the number of draws in the trace. Several draws are vectorised.
    :param rank: the number of batch dims, including the dim of the draws.
    :param is_wanted: a function that returns whether to take a site.
    :param read: a function that returns a tensor of a site; None for its value.
    :param constants: the names of deterministic sites without the dim of the draws.
    :returns: a dict from site name to array.
    """
    arrays = {}
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or not is_wanted(node):
            continue
        by_dim = {plate.dim: plate for plate in plates_of(node) if plate.dim is not None}
        value, event_dim = (read(node), 0) if read else (node["value"], node["fn"].event_dim)
        if is_deterministic(node) and event_dim == value.dim():
            # No event_dim was given. All dims except those of plates and draws are event dims.
            has_draws = num_draws > 1 and name not in constants
            event_dim = max(0, value.dim() - (rank if has_draws else -min(by_dim, default=0)))
            stray = [dim for dim in range(1 - rank, 0) if dim not in by_dim]
            value, event_dim = _with_events_last(value, event_dim, stray)
        plates, whole = with_plates(node, value, event_dim, num_draws, rank)
        if whole.dtype is torch.bfloat16:  # unknown to NumPy
            whole = whole.float()
        arrays[name] = SiteArray(plates, whole.cpu().numpy())
    return arrays


def _with_events_last(value: Tensor, event_dim: int, dims: Iterable[int]) -> tuple[Tensor, int]:
    """Return a value with some of its batch dims behind the others, as event dims.

    :param value: the value of a site.
    :param event_dim: the number of its event dims.
    :param dims: the batch dims to move, counted from the right.
    :returns: the value, and its number of event dims.
    """
    for dim in dims:
        position = value.dim() - event_dim + dim
        if position >= 0 and value.shape[position] > 1:
            value = value.movedim(position, -1).unsqueeze(position)
            event_dim += 1
    return value, event_dim


def joined(parts: Sequence[dict[str, SiteArray]], plate: str | None = None) -> dict[str, SiteArray]:
    """Return the sites of several parts, joined end to end.

    :param parts: for each part, a dict from site name to array.
    :param plate: the plate along which to join the sites in it. Other sites are taken from the
        first part. With None, all sites are joined along the draws.
    :returns: a dict from site name to array.
    """
    found = dict(parts[0])
    for part in parts:
        if names := found.keys() ^ part.keys():
            raise ValueError(
                f"Site '{min(names)}' is not in every draw, so its draws are not an array. Give "
                "the programs the same sites in every run."
            )
    for name, (plates, _) in found.items():
        if plate is None or plate in plates:
            axis = 0 if plate is None else 1 + plates.index(plate)
            values = np.concatenate([part[name].values for part in parts], axis)
            found[name] = SiteArray(plates, values)
    return found


def is_latent(node: Any) -> bool:
    """Return whether a site is latent, or a function of latent sites."""
    if is_left_by_do(node) and is_masked_out(node):
        return False
    is_observed = node["is_observed"] or node["infer"].get("was_observed")
    return not is_observed or is_deterministic(node) or _is_at_own_point(node)


def _is_at_own_point(node: Any) -> bool:
    """Return whether a site is "observed" at the point of its Delta, as by ConjugateReparam."""
    return is_delta(node["fn"]) and torch.equal(base_of(node["fn"]).v, node["value"])


def is_observation(node: Any) -> bool:
    """Return whether a site is observed, or was observed before :func:`free_model`.

    Factors are not observations.
    """
    is_observed = node["is_observed"] or node["infer"].get("was_observed")
    return is_observed and not is_latent(node) and not isinstance(node["fn"], Unit)


def has_density(node: Any) -> bool:
    """Return whether a site is not masked out as a whole."""
    return not is_masked_out(node)


def log_prob(node: Any) -> Tensor:
    """Return the log-probability, masked but not scaled."""
    return scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])


def log_density(node: Any, user_scale: Any) -> Tensor:
    """Return the log-probability without subsampling scales.

    :param node: the site.
    :param user_scale: the user's scale that is the same at every site, which is left out too.
    """
    subsampling = math.prod(plate.subsampling_scale for plate in plates_of(node))
    return divided(node["log_prob"] / subsampling, user_scale)


def is_unmasked(node: Any) -> Tensor:
    """Return which elements are not masked out."""
    log_prob = node["log_prob"]
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    for part in (node["mask"], mask_of(node["fn"])):
        if part is not None:
            mask = mask & torch.as_tensor(part, device=mask.device)
    return mask
