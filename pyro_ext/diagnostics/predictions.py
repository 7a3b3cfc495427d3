"""Observations for new data, drawn by the model for each draw of the posterior."""

from typing import Any

import torch
from pyro import poutine

from pyro_ext.diagnostics.free_model import free_model
from pyro_ext.diagnostics.site_arrays import (
    Groups,
    SiteArray,
    is_deterministic,
    joined,
    site_arrays,
)
from pyro_ext.tracing import Programs
from pyro_ext.tracing.density_sites import plates_of
from pyro_ext.tracing.particle_plate import plated
from pyro_ext.tracing.plate_sizes import set_plate_sizes


@torch.no_grad()
def draw_predictions(programs: Programs, groups: Groups, chunk_size: int) -> dict[str, SiteArray]:
    """Draw observations for new arguments, one for each draw of the posterior.

    The posterior has no information about new rows. The model therefore draws the latent sites in
    the plates of the data, given the other latent sites.

    :param programs: the model, with the new arguments.
    :param groups: the posterior draws, and the observed sites.
    :param chunk_size: the number of draws at once.
    :returns: a dict from site name to the drawn observations.
    """
    posterior, names = groups["posterior"], groups["observed_data"]
    free = free_model(programs.model)
    with poutine.block():
        probe = poutine.trace(free).get_trace(*programs.args, **programs.kwargs)
    set_plate_sizes(probe)
    nodes: dict[str, Any] = {
        name: node for name, node in probe.nodes.items() if node["type"] == "sample"
    }
    frames = [plate for node in nodes.values() for plate in plates_of(node)]
    nesting = max((-(plate.dim or 0) for plate in frames), default=0)
    of_data = {p.name for name in names if name in nodes for p in plates_of(nodes[name])}
    known = {
        name: array
        for name, array in posterior.items()
        if name in nodes
        and not is_deterministic(nodes[name])
        and not of_data.intersection(array.plates)
    }
    num_draws = len(next(iter(groups["log_p"].values())).values)

    def chunk(start: int) -> dict[str, SiteArray]:
        n = min(chunk_size, num_draws - start)
        data = {}
        for name, array in known.items():
            sizes = {p.dim: p.size for p in plates_of(nodes[name]) if p.dim is not None}
            values = torch.as_tensor(array.values[start : start + n])
            event = values.shape[1 + len(array.plates) :]
            shape = [sizes.get(dim, 1) for dim in range(-nesting, 0)]
            draws = (n,) if n > 1 else ()
            data[name] = values.reshape(*draws, *shape, *event).to(nodes[name]["value"].device)
        model = plated(poutine.condition(free, data=data), n, nesting)
        trace = poutine.trace(model).get_trace(*programs.args, **programs.kwargs)
        set_plate_sizes(trace)
        return site_arrays(trace, n, 1 + nesting, lambda node: node["name"] in names)

    return joined([chunk(start) for start in range(0, num_draws, chunk_size)])
