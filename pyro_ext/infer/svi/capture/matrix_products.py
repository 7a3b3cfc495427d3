"""Matrix products of a graph by oneDNN, on CPUs for which MKL has only slower code."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_ext._private.of_torch import onednn_linear, set_fake_values

#: The number of multiplications from which oneDNN is faster than MKL.
_LEAST_SIZE = 3_000_000

_PRODUCTS = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


def with_faster_products(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Return a graph that computes large products in float32 by oneDNN if that is faster.

    MKL uses its code for AVX-512 on processors of Intel only. The choice depends on the processor
    and on sizes, but on no measured times, so that runs can be repeated.

    :param graph: the graph, which stays as it is.
    :param inputs: its inputs.
    """
    if not _is_slow_with_mkl() or not any(node.target in _PRODUCTS for node in graph.graph.nodes):
        return graph
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    found = GraphModule(graph, copied)
    set_fake_values(found, inputs)
    for node in found.graph.nodes:
        if node.target in _PRODUCTS and not node.kwargs:
            _replace(node)
    found.recompile()
    return found


@cache
def _is_slow_with_mkl() -> bool:
    """Return whether the processor is not from Intel, though it has AVX-512."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" not in processor and "avx512f" in processor


def _replace(node: Node) -> None:
    """Replace a product of large matrices in float32 on a CPU."""
    nodes: tuple[Any, ...] = node.args
    *bias, a, b = nodes
    values = [arg.meta["val"] for arg in nodes]
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in values):
        return
    if bias and values[0].dim() != 1:
        return
    (m, k), n = values[-2].shape, values[-1].shape[1]
    if m * k * n < _LEAST_SIZE:
        return
    with node.graph.inserting_before(node):
        transposed = node.graph.call_function(torch.ops.aten.t.default, (b,))
    node.target = onednn_linear()
    node.args = (a, transposed, bias[0] if bias else None)
