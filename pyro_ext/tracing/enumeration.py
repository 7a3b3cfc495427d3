"""Exact sums over the discrete sites of a model that are marked for enumeration."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from opt_einsum import shared_intermediates
from pyro.infer.util import is_validation_enabled
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext._private.of_pyro import packed_dims, with_packed_dims
from pyro_ext.tracing.combined_draws import log_proposal, num_draws_of
from pyro_ext.tracing.density_sites import DensitySite, plates_of
from pyro_ext.tracing.sites import SiteError

#: A site of a sum, and the log of its factor.
Member = tuple[DensitySite, Tensor]

_MAX_DIMS = 64  # of a tensor of torch


class NeedsEnumerationError(Exception):
    """An error for a site that is marked for enumeration, in a run that does not enumerate."""


def is_marked(msg: Any) -> bool:
    """Return whether a latent site is marked for enumeration."""
    return not msg["is_observed"] and bool((msg["infer"] or {}).get("enumerate"))


def is_enumerated(node: Any) -> bool:
    """Return whether a site of a trace has all values of its support, along a dim of its own."""
    return "_enumerate_dim" in node["infer"] and num_draws_of(node) is None


class ModelEnumeration(EnumMessenger):
    """A handler that gives each marked site of a model all values of its support.

    Sites that the guide draws keep their draws.

    :param first_available_dim: the dim to the left of all plates and of the particles, negative;
        None for the first dim that the guide leaves free.
    """

    def _pyro_sample(self, msg: Message) -> None:
        if is_marked(msg) and not msg["done"]:
            _check(msg)
        super()._pyro_sample(msg)
        dim = (msg["infer"] or {}).get("_enumerate_dim", 0)
        if dim < -_MAX_DIMS:
            raise SiteError(
                f"Site '{msg['name']}' is enumerated along dim {dim}, but tensors have at most "
                f"{_MAX_DIMS} dims. Put independent sites in a vectorised plate, and sites of a "
                "chain in pyro.markov."
            )


def _check(msg: Message) -> None:
    name, infer, fn = msg["name"], msg["infer"] or {}, msg["fn"]
    if infer["enumerate"] != "parallel":
        raise SiteError(
            f"Site '{name}' is marked for {infer['enumerate']} enumeration, which only a guide can "
            "have. Mark it with infer={'enumerate': 'parallel'}."
        )
    if infer.get("num_samples") is not None:
        raise SiteError(
            f"Site '{name}' is marked for enumeration with num_samples=, which draws it. Leave out "
            "num_samples= to sum over its support, or draw the site in the guide."
        )
    if not getattr(fn, "has_enumerate_support", False):
        raise SiteError(
            f"Site '{name}' is marked for enumeration, but {type(fn).__name__} has no support that "
            "can be enumerated. Draw the site in the guide, or use a distribution with finitely "
            "many values."
        )


def marginal_sites(
    trace: Trace, sites: Sequence[DensitySite], plate_to_symbol: dict[str, str] | None = None
) -> list[DensitySite]:
    r"""Return the sites of a model, with sums in the place of sites that share enumerated values.

    .. math:: \log \sum_d p(x, z, d)

    A sum stands for all sites that depend on each other through enumerated values, or through
    several draws of a guide site. It has the name of the first of them, and those plates whose
    elements have separate sums.

    :param trace: the trace of a model that ran under :class:`ModelEnumeration`.
    :param sites: its density sites, and those of a guide that ran under :class:`CombinedDraws`.
    :param plate_to_symbol: the symbols of the plates in the packed trace of this guide. Without
        them, the draws of its sites stay separate.
    :raises SiteError: if scales, masks or plates do not allow the sum.
    """
    with_dims = [
        site
        for site in sites
        if is_enumerated(site.node)
        or (plate_to_symbol is not None and num_draws_of(site.node) is not None)
    ]
    if not with_dims:
        return list(sites)
    trace.pack_tensors(plate_to_symbol)
    symbols = {site.node["infer"]["_enumerate_symbol"] for site in with_dims}
    rest: list[DensitySite] = []
    groups: list[tuple[set[str], list[Member]]] = []
    for site in sites:
        factor = factor_of(site, symbols)
        dims = symbols.intersection(packed_dims(factor))
        if not dims:
            rest.append(site)
            continue
        joined = [group for group in groups if not dims.isdisjoint(group[0])]
        groups = [group for group in groups if group not in joined]
        groups.append(
            (
                dims.union(*(group[0] for group in joined)),
                [*(member for group in joined for member in group[1]), (site, factor)],
            )
        )
    return [*rest, *(_summed(trace, dims, members) for dims, members in groups)]


def _summed(trace: Trace, dims: set[str], members: Sequence[Member]) -> DensitySite:
    """Return the log of the sum of the product of the factors of some sites."""
    sites = [site for site, _ in members]
    if is_validation_enabled():
        _check_masks(sites)
    first = next(site for site in sites if site.node["infer"].get("_enumerate_symbol") in dims)
    ((ordinal, (log_sum,)),) = log_sums(trace, dims, members).items()
    frames = tuple(
        frame
        for frame in first.node["cond_indep_stack"]
        if not frame.vectorized or trace.plate_to_symbol[frame.name] in ordinal
    )
    node = {
        **first.node,
        "is_observed": True,
        "cond_indep_stack": frames,
        "log_prob": log_sum * _common_scale(first, sites, frames),
        "unscaled_log_prob": log_sum,
    }
    return DensitySite("model", first.name, node, plates_of(node), tuple(sites))


def factor_of(site: DensitySite, symbols: set[str]) -> Tensor:
    """Return the log of a factor of a sum: a density of the model, or the inverse of a proposal.

    :param site: the site, from a packed trace.
    :param symbols: the symbols of the values to sum over.
    """
    log_prob = site.node["packed"]["unscaled_log_prob"]
    num_draws = num_draws_of(site.node)
    if site.program == "guide" and num_draws is not None:
        own = site.node["infer"]["_enumerate_symbol"]
        log_prob = log_proposal(log_prob, own, symbols, num_draws)
    if not is_enumerated(site.node):
        log_prob = packed.scale_and_mask(log_prob, mask=site.node["packed"]["mask"])
    if site.program == "model":
        return log_prob
    factor = -log_prob if num_draws is None else -log_prob - math.log(num_draws)
    return with_packed_dims(factor, packed_dims(log_prob))


def log_sums(
    trace: Trace, dims: set[str], members: Sequence[Member]
) -> dict[frozenset[str], list[Tensor]]:
    """Return the logs of the sums of the product of some factors, not scaled.

    :param trace: the packed trace.
    :param dims: the symbols of the values to sum over.
    :param members: the sites with their factors.
    :returns: the sums over connected sites, by the symbols of the plates that they keep.
    """
    owners = {
        site.node["infer"]["_enumerate_symbol"]: site
        for site, _ in reversed(members)
        if "_enumerate_dim" in site.node["infer"]
    }
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site, factor in members:
        ordinal = _ordinal(trace, site)
        for symbol in dims.intersection(packed_dims(factor)):
            if not _ordinal(trace, owners[symbol]) <= ordinal:
                raise SiteError(
                    f"Site '{site.name}' depends on site '{owners[symbol].name}', but is outside "
                    f"of a plate of it{_in_plates(owners[symbol])}. The values of its elements "
                    "cannot be summed one by one. Put both in the same plates, or "
                    f"{_without_sum(owners[symbol])}."
                )
        factors.setdefault(ordinal, []).append(factor)
    try:
        with shared_intermediates() as cache:
            tree = contract_tensor_tree(factors, dims, ring=LogRing(cache))
    except (NotImplementedError, ValueError) as error:
        name = next(reversed(owners.values())).name
        raise SiteError(
            f"Site '{name}' cannot be summed out, because of its plates: {error}"
        ) from error
    return {
        ordinal: [packed.unpack(term, trace.symbol_to_dim) for term in terms]
        for ordinal, terms in tree.items()
    }


def _ordinal(trace: Trace, site: DensitySite) -> frozenset[str]:
    stack = site.node["cond_indep_stack"]
    return frozenset(trace.plate_to_symbol[frame.name] for frame in stack if frame.vectorized)


def _common_scale(first: DensitySite, members: Iterable[DensitySite], frames: Iterable[Any]) -> Any:
    """Return the scale of all sites of a sum.

    :raises SiteError: if their scales differ, or if a scale differs along a dim of the sum.
    """
    scale = first.node["scale"]
    dims = {frame.dim for frame in frames}
    if isinstance(scale, Tensor) and any(
        scale.shape[dim] != 1 for dim in range(-scale.dim(), 0) if dim not in dims
    ):
        raise SiteError(
            f"Site '{first.name}' is summed out under a scale of shape {tuple(scale.shape)}, which "
            "differs along a dim that the sum includes. Use a scale that is constant there."
        )
    for site in members:
        if not _is_equal(site.node["scale"], scale):
            raise SiteError(
                f"Sites '{first.name}' and '{site.name}' are summed out together, but have "
                f"different scales: {_plates_or_scale(first)} and {_plates_or_scale(site)}. A "
                "scale inside of a sum would change its meaning. Put them in the same subsampled "
                f"plates, use all rows, or {_without_sum(first)}."
            )
    return scale


def _without_sum(site: DensitySite) -> str:
    return "draw the site in the guide" if is_enumerated(site.node) else "use num_particles=1"


def _is_equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        if not is_validation_enabled():
            return True
        return torch.equal(*torch.broadcast_tensors(torch.as_tensor(x), torch.as_tensor(y)))
    return bool(x == y)


def _plates_or_scale(site: DensitySite) -> str:
    names = sorted(plate.name for plate in site.plates if plate.subsampling_scale != 1)
    scale = site.node["scale"]
    shown = f"a tensor of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else f"{scale:g}"
    return f"{shown} (plate {', '.join(map(repr, names))})" if names else shown


def _check_masks(members: Sequence[DensitySite]) -> None:
    """Raise a SiteError if a mask hides a site, but not all sites that depend on it."""
    for site in members:
        if not is_enumerated(site.node) or not isinstance(site.node["mask"], Tensor):
            continue
        symbol, mask = site.node["infer"]["_enumerate_symbol"], site.node["mask"]
        for other in members:
            if symbol not in packed_dims(other.node["packed"]["unscaled_log_prob"]):
                continue
            of_other = other.node["mask"]
            of_other = torch.as_tensor(True if of_other is None else of_other, device=mask.device)
            if (of_other & ~mask & ~_is_point(site.node["unscaled_log_prob"])).any():
                raise SiteError(
                    f"A mask hides site '{site.name}' where it does not hide site '{other.name}', "
                    f"which depends on it{_in_plates(site)}. The sum over '{site.name}' includes "
                    "its prior in any case. Put both under the same poutine.mask."
                )


def _is_point(log_prob: Tensor) -> Tensor:
    """Return where a prior has a single value up to rounding, so that its mask is of no effect."""
    eps = torch.finfo(log_prob.dtype).eps
    return (log_prob > -(eps**0.5)) | (log_prob < math.log(eps) + 1)


def _in_plates(site: DensitySite) -> str:
    names = sorted(plate.name for plate in site.plates)
    return f", in plate {', '.join(map(repr, names))}" if names else ""
