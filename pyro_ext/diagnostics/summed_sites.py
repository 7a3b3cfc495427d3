"""The likelihoods of a model, with its enumerated sites summed out."""

from collections.abc import Iterable
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.diagnostics.site_arrays import is_observation, is_unmasked, log_prob
from pyro_ext.tracing.density_sites import DensitySite
from pyro_ext.tracing.enumeration import factor_of, is_enumerated, log_sums


def with_sums(trace: Trace, sites: Iterable[DensitySite]) -> Trace:
    """Return a trace of a model with one site in the place of sites that are summed out together.

    This site has the name of the first observed site in the sum.

    :param trace: the trace of the model.
    :param sites: its density sites.
    """
    sums = [site for site in sites if site.members]
    if not sums:
        return trace
    members = {member.name for site in sums for member in site.members}
    found = Trace()
    node: Any
    for name, node in trace.nodes.items():
        if name not in members:
            found.add_node(name, **node)
    for site in sums:
        observed = [member for member in site.members if is_observation(member.node)]
        name = observed[0].name if observed else site.name
        likelihood = _log_likelihood(trace, site) if observed else None
        node = {**site.node, "name": name, "is_observed": bool(observed), "likelihood": likelihood}
        node["has_data"] = [_reduced(site, is_unmasked(m.node), torch.any) for m in observed]
        found.add_node(name, **node)
    return found


def log_likelihood(node: Any) -> Tensor:
    """Return the log-likelihood of an observed site or a sum, masked but not scaled."""
    return node["likelihood"] if "likelihood" in node else log_prob(node)


def has_data(node: Any) -> Tensor:
    """Return which elements of an observed site or a sum have data that is not masked out."""
    if "has_data" not in node:
        return is_unmasked(node)
    return torch.stack(torch.broadcast_tensors(*node["has_data"])).any(0)


def _log_likelihood(trace: Trace, site: DensitySite) -> Tensor:
    """Return the log density of the observed sites in a sum, given the other sites."""
    found = site.node["unscaled_log_prob"]
    rest = [member for member in site.members if not is_observation(member.node)]
    if all(is_enumerated(member.node) for member in rest):
        return found
    dims = {m.node["infer"]["_enumerate_symbol"] for m in rest if is_enumerated(m.node)}
    for terms in log_sums(trace, dims, [(m, factor_of(m, dims)) for m in rest]).values():
        for term in terms:
            found = found - _reduced(site, term, torch.sum)
    return found


def _reduced(site: DensitySite, x: Tensor, reduce: Any) -> Tensor:
    """Return a tensor reduced over all dims that are not those of a sum."""
    plates = {frame.dim or 0 for frame in site.node["cond_indep_stack"]}
    for dim in range(-x.dim(), 0):
        if dim not in plates:
            x = reduce(x, dim, keepdim=True)
    return x.reshape(x.shape[max(0, x.dim() + min(plates, default=0)) :])
