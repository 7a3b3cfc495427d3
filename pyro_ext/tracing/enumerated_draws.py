"""Draws of the discrete sites that are summed out of a model, given its other sites."""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_ext._private.of_pyro import sample_posterior
from pyro_ext.tracing.enumeration import is_enumerated


@torch.no_grad()
def latent_draws(guide_trace: Trace, model_trace: Trace) -> Trace:
    r"""Return the latent sites of a guide, with draws of the sites that its model sums out.

    .. math:: d \sim p(d \mid x, z)

    :param guide_trace: the trace of the guide, which draws z.
    :param model_trace: the trace of the model, as :class:`ParticleTracer` returns it.
    :returns: a trace against which the model can be replayed.
    """
    drawn = guide_trace.copy()
    for name in [name for name, node in drawn.nodes.items() if node.get("is_observed")]:
        drawn.remove_node(name)  # the model has its own values of what the guide observes
    for name, value in _draw_enumerated(model_trace).items():
        drawn.add_node(name, **{**model_trace.nodes[name], "value": value, "infer": {}})
    return drawn


def _draw_enumerated(trace: Trace) -> dict[str, Tensor]:
    nodes: dict[str, Any] = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and is_enumerated(node)
    }
    if not nodes:
        return {}
    trace.pack_tensors()
    for node in nodes.values():  # the sums ignore the masks of these sites
        node["packed"]["masked_log_prob"] = node["packed"]["unscaled_log_prob"]

    def read() -> dict[str, Tensor]:
        infer: Any = {"enumerate": "parallel"}
        return {name: pyro.sample(name, node["fn"], infer=infer) for name, node in nodes.items()}

    with poutine.block():
        return sample_posterior(read, trace, 1, False)
