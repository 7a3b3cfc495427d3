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
from pyro_ext.tracing.density_sites import plates_of
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

#: Tells whether a site is taken.
Predicate = Callable[[Any], bool]

#: Reads a tensor without event dims from a site.
Reading = Callable[[Any], Tensor]


def site_arrays(
    trace: Trace,
    num_draws: int,
    rank: int,
    is_wanted: Predicate,
    read: Reading | None = None,
    constants: Collection[str] = (),
) -> dict[str, SiteArray]:
    """The arrays of some sites of a trace.

    :param int num_draws: how many draws it has; several are vectorised.
    :param int rank: the number of batch dims, with that of the draws.
    :param is_wanted: tells whether to take a site.
    :param read: a tensor of a site; None for its value.
    :param constants: deterministic sites that lack the dim of the draws.
    """
    arrays = {}
    node: Any
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or not is_wanted(node):
            continue
        by_dim = {plate.dim: plate for plate in plates_of(node) if plate.dim is not None}
        value, event_dim = (read(node), 0) if read else (node["value"], node["fn"].event_dim)
        if is_deterministic(node) and event_dim == value.dim():
            # No event_dim was given. Dims of neither plates nor draws are event dims.
            has_draws = num_draws > 1 and name not in constants
            event_dim = max(0, value.dim() - (rank if has_draws else -min(by_dim, default=0)))
        event = value.shape[value.dim() - event_dim :]
        batch = [by_dim[dim].size if dim in by_dim else 1 for dim in range(1 - rank, 0)]
        plates = [by_dim[dim] for dim in sorted(by_dim)]
        sizes = [plate.size for plate in plates]
        whole = value.expand(num_draws, *batch, *event).reshape(num_draws, *sizes, *event)
        arrays[name] = SiteArray(tuple(plate.name for plate in plates), whole.cpu().numpy())
    return arrays


def joined(parts: Sequence[dict[str, SiteArray]], plate: str | None = None) -> dict[str, SiteArray]:
    """The sites of several parts, end to end.

    :param str plate: the sites in this plate are joined along it, and the others are taken from the
        first part. None joins all sites along the draws.
    """
    found = dict(parts[0])
    for name, (plates, _) in found.items():
        if plate is None or plate in plates:
            axis = 0 if plate is None else 1 + plates.index(plate)
            values = np.concatenate([part[name].values for part in parts], axis)
            found[name] = SiteArray(plates, values)
    return found


def is_deterministic(node: Any) -> bool:
    """Whether a site is a deterministic one."""
    return bool(node["infer"].get("_deterministic"))


def is_latent(node: Any) -> bool:
    """Whether a site is latent, or deterministic."""
    is_observed = node["is_observed"] or node["infer"].get("was_observed")
    return not is_observed or is_deterministic(node)


def is_observation(node: Any) -> bool:
    """Whether a site is observed, or was before the model was freed; factors are not."""
    return not is_latent(node) and not isinstance(node["fn"], Unit)


def has_density(node: Any) -> bool:
    """Whether a site is not masked out as a whole."""
    return not is_masked_out(node)


def log_prob(node: Any) -> Tensor:
    """The log-probability, masked but not scaled."""
    return scale_and_mask(node["fn"].log_prob(node["value"]), mask=node["mask"])


def log_density(node: Any) -> Tensor:
    """With the scales of a user, as SVI has it, but not those of subsampling."""
    return node["log_prob"] / math.prod(plate.subsampling_scale for plate in plates_of(node))


def is_unmasked(node: Any) -> Tensor:
    """Which elements count."""
    log_prob = node["log_prob"]
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    for part in (node["mask"], mask_of(node["fn"])):
        if part is not None:
            mask = mask & torch.as_tensor(part, device=mask.device)
    return mask
