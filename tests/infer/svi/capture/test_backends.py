"""Compiled graphs are kept on disk, and found again by what they compute."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

from pyro_ext.infer.svi.capture.backends import Backend, compile_graph


def times(constant):
    """A graph that multiplies by a constant, and draws random numbers."""
    root = torch.nn.Module()
    root.constant = torch.full((3,), constant)
    graph = Graph()
    x = graph.placeholder("x")
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr("constant")))
    noise = graph.call_function(torch.ops.aten.randn_like.default, (x,))
    graph.output((product, noise))
    return GraphModule(root, graph)


@pytest.mark.long
def test_equal_graphs_are_found_on_disk_and_keep_their_constants(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.ones(3)
    before = counters["inductor"]["fxgraph_cache_hit"]
    for constant in (2.0, 5.0):
        compiled = compile_graph(times(constant), [x], Backend("inductor", "default"))
        torch.manual_seed(0)
        product, noise = compiled.run(x)
        torch.manual_seed(0)
        assert product.tolist() == [constant] * 3
        assert torch.equal(noise, torch.randn(3))
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1
