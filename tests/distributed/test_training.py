import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam

from pyro_ext.distributed import DistributedNoise
from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import EagerSVI
from tests.distributed.pool import SIZES, objectives
from tests.distributed.training import NAMES, loader, train

pytestmark = pytest.mark.long


def assert_equal(found, expected):
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", objectives(NAMES))
def test_several_processes_take_the_steps_of_one(pools, name, is_compiled, size):
    expected = train(name, is_compiled)
    for found in pools(size).results(train, name, is_compiled):
        assert_equal(found, expected)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_four_processes_take_the_steps_of_one(pools, is_compiled):
    expected = train("local plate", is_compiled)
    for found in pools(4).results(train, "local plate", is_compiled):
        assert_equal(found, expected)


@pytest.mark.slow
def test_graphs_that_inductor_compiles_are_right(pools):
    expected = train("local plate", True, backend="inductor")
    for found in pools(2).results(train_compiled, "local plate"):
        assert_equal(found, expected)


def train_compiled(name):
    return train(name, True, backend="inductor")


class Regression(PyroModule):
    """A model whose parameters Pyro can keep in the module."""

    def __init__(self):
        super().__init__()
        self.weights = PyroParam(torch.randn(2))
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x):
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("y", dist.Normal(x[:, :2] @ self.weights, self.scale * noise), obs=x[:, 2])


def train_in_module():
    with pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(current_processes().rank if current_processes() else 0)
        model = Regression()
        svi = EagerSVI(model, AutoNormal(model), pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        with DistributedNoise("data", seed=7, per_row=True):
            losses = svi.run(loader(8), 3, progress_bar=False).losses
        assert len(pyro.get_param_store()) == 0
        return losses, {n: x.detach() for n, x in model.named_parameters()}


def test_parameters_outside_of_the_param_store_are_trained(pools):
    expected = train_in_module()
    for found in pools(2).results(train_in_module):
        assert_equal(found, expected)
