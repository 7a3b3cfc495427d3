"""Values of a trace's sites as numpy arrays, with draws and named plates on the left."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext._private.of_pyro import mask_of
from pyro_ext.tracing.density_sites import Plate, plates_of
from pyro_ext.tracing.sites import is_masked_out


class SiteArray(NamedTuple):
    """Values of a site: the names of its plates, and an array ``(draw, *plates, *event)``."""

    plates: tuple[str, ...]
    values: np.ndarray

    def sum_to(self, plates: Sequence[str]) -> np.ndarray:
        """Sums over the other plates."""
        axes = tuple(1 + i for i, name in enumerate(self.plates) if name not in plates)
        return self.values.sum(axes, dtype=np.float64)


#: From the name of a group to its sites. Log-densities of sites are in groups of their own.
Groups = dict[str, dict[str, SiteArray]]


def site_arrays(
    trace: Trace,
    num_draws: int,
    rank: int,
    is_wanted: Callable[[Any], bool],
    value_of: Callable[[Any], tuple[Tensor, int]],
    constants: Collection[str] = (),
) -> dict[str, SiteArray]:
    """The arrays of some sites of a trace.

    :param int num_draws: how many draws it has; several are vectorised.
    :param int rank: the number of batch dims, with that of the draws.
    :param is_wanted: tells whether to take a site.
    :param value_of: a tensor of a site, and the number of its event dims.
    :param constants: deterministic sites that lack the dim of the draws.
    """
    arrays = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or not is_wanted(node):
            continue
        plates = sorted(
            (plate for plate in plates_of(node) if plate.dim is not None),
            key=lambda plate: plate.dim or 0,
        )
        value, event_dim = value_of(node)
        if is_deterministic(node) and event_dim == value.dim():
            # No event_dim was given: what is neither plate nor draw is event.
            depth = max((-(plate.dim or 0) for plate in plates), default=0)
            has_draws = num_draws > 1 and name not in constants
            event_dim = max(0, value.dim() - (rank if has_draws else depth))
        laid_out = _lay_out(value, event_dim, plates, num_draws, rank)
        arrays[name] = SiteArray(tuple(plate.name for plate in plates), laid_out.cpu().numpy())
    return arrays


def _lay_out(
    value: Tensor, event_dim: int, plates: Sequence[Plate], num_draws: int, rank: int
) -> Tensor:
    """A value of shape ``(draw, *plates, *event)``."""
    num_batch = value.dim() - event_dim
    batch, event = value.shape[:num_batch], value.shape[num_batch:]
    value = value.reshape((1,) * (rank - len(batch)) + tuple(batch) + tuple(event))
    sizes = {plate.dim: plate.size for plate in plates}
    fillers = [dim + rank for dim in range(-rank + 1, 0) if dim not in sizes]
    shape = [num_draws, *(sizes.get(dim, 1) for dim in range(-rank + 1, 0))]
    value = value.expand(*shape, *event)
    return value.reshape([size for i, size in enumerate(value.shape) if i not in fillers])


def is_deterministic(node: Any) -> bool:
    """Whether a site is a deterministic one."""
    return bool(node["infer"].get("_deterministic"))


def _was_observed(node: Any) -> bool:
    return bool(node["is_observed"] or node["infer"].get("was_observed"))


def is_latent(node: Any) -> bool:
    """Whether a site is latent, or deterministic."""
    return not _was_observed(node) or is_deterministic(node)


def is_observation(node: Any) -> bool:
    """Whether a site is observed, or was before the model was freed; factors are not."""
    return _was_observed(node) and not is_deterministic(node) and not isinstance(node["fn"], Unit)


def has_density(node: Any) -> bool:
    """Whether a site is not masked out as a whole."""
    return not is_masked_out(node)


def value_of_site(node: Any) -> tuple[Tensor, int]:
    """The value of a site, and the number of its event dims."""
    return node["value"], node["fn"].event_dim


def log_prob(node: Any) -> tuple[Tensor, int]:
    """The log-probability, masked but not scaled."""
    log_prob = node["fn"].log_prob(node["value"])
    return scale_and_mask(log_prob, mask=node["mask"]), 0


def log_density(node: Any) -> tuple[Tensor, int]:
    """With the scales of a user, as SVI has it, but not those of subsampling."""
    scale = math.prod(plate.subsampling_scale for plate in plates_of(node))
    return node["log_prob"] / scale, 0


def is_unmasked(node: Any) -> tuple[Tensor, int]:
    """Which elements count."""
    log_prob = node["log_prob"]
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    for part in (node["mask"], mask_of(node["fn"])):
        if part is not None:
            mask = mask & torch.as_tensor(part, device=mask.device)
    return mask, 0
