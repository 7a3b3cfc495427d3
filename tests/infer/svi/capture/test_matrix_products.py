"""Large products in float32 run by oneDNN where MKL is slow."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.capture import matrix_products
from pyro_ext.infer.svi.capture.matrix_products import with_faster_products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    monkeypatch.setattr(matrix_products, "_is_slow_with_mkl", lambda: True)


def products(x, y, bias):
    return torch.mm(x, y), torch.addmm(bias, x, y), torch.mm(x.t(), x), torch.mm(y.t(), x.t())


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes]


def test_products_have_the_values_of_torch():
    torch.manual_seed(0)
    inputs = torch.randn(150, 170), torch.randn(170, 190), torch.randn(190)
    graph = make_fx(products)(*inputs)
    before = targets(graph)
    found = with_faster_products(graph, inputs)
    assert targets(found).count("pyro_ext.linear.default") == 4
    assert targets(graph) == before
    exact = products(*(x.double() for x in inputs))
    for value, expected in zip(found(*inputs), exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
        assert value.is_contiguous()


@pytest.mark.parametrize(("size", "dtype"), [(20, torch.float32), (150, torch.float64)])
def test_small_products_and_other_dtypes_stay(size, dtype):
    inputs = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    inputs = *inputs, torch.randn(size, dtype=dtype)
    found = with_faster_products(make_fx(products)(*inputs), inputs)
    assert "pyro_ext.linear.default" not in targets(found)


@pytest.mark.long
def test_compiled_steps_train_as_eager_ones():
    torch.manual_seed(0)
    x = torch.randn(100, 200)
    networks = nn.Linear(200, 200), nn.Linear(200, 200)
    start = [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]

    def model(x):
        pyro.module("decoder", networks[0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(200), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(networks[0](z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", networks[1])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(networks[1](x), 1.0).to_event(1))

    losses = []
    for make in (SVI, CompiledSVI):
        for network, state in zip(networks, start, strict=True):
            network.load_state_dict(state)
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        elbo = ImportanceWeightedELBO(3, max_plate_nesting=1)
        svi = make(model, guide, pyro.optim.SGD({"lr": 1e-5}), elbo)
        losses.append([svi.step(x) for _ in range(5)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0.0)
    (graph,) = svi.capture_report().graphs
    assert graph.num_kernels
