"""What runs a captured graph."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Backend(NamedTuple):
    """How graphs are compiled.

    :param str name: ``"inductor"``, or ``"eager"`` for graphs as they are.
    :param str mode: a mode of ``torch.compile``, for Inductor.
    """

    name: str
    mode: str


def compile_graph(
    graph: GraphModule, inputs: Sequence[Tensor], backend: Backend
) -> Callable[..., Sequence[Tensor | None]]:
    """A function that computes what a graph does."""
    if backend.name == "eager":
        return graph
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    # Random numbers of the eager generator: the same stream as a step of Pyro's, and quicker.
    options = {**list_mode_options(backend.mode), "fallback_random": True}
    random = torch.Tag.nondeterministic_seeded
    with torch.no_grad(), config.patch(options):
        decompositions = {
            operator: decomposition
            for operator, decomposition in select_decomp_table().items()
            if random not in getattr(operator, "tags", ())
        }
        compiled: Any = compile_fx(graph, list(inputs), decompositions=decompositions)
    return compiled
