"""Programs may be modules, and call networks."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.nn import LeadingDims
from tests.registry import EVERY_ESTIMATOR, VECTORIZE


class Encoder(PyroModule):
    """A guide in module form, with a network and a constrained parameter."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)
        self.scale = PyroParam(torch.tensor(0.8), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc = self.net(x.unsqueeze(-1))
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


class Decoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z).squeeze(-1), 1.0), obs=x)


@pytest.fixture
def local_params():
    with pyro.settings.context(module_local_params=True):
        yield


@pytest.mark.long
@EVERY_ESTIMATOR
def test_module_interface_with_a_torch_optimizer(make, smallest, local_params):
    x = torch.linspace(-1, 1, 6)
    # The pathwise rule of ChiUpperELBO needs many particles.
    module = make(smallest + 3, gradient="dreg")(Decoder(), Encoder())
    first = module(x)
    assert len(list(module.parameters())) == 5
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = module(x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < first.item()
    module.load_state_dict(copy.deepcopy(module).state_dict())


@VECTORIZE
def test_pyro_module_statement_in_both_programs(vectorize):
    encoder, decoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).squeeze(-1), 1.0), obs=x[index])

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), subsample_size=2) as index:
            loc = encoder(x[index].unsqueeze(-1))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    before = copy.deepcopy(list(encoder.parameters()) + list(decoder.parameters()))
    elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo).step(torch.randn(6))
    for old, new in zip(before, [*encoder.parameters(), *decoder.parameters()], strict=True):
        assert (old != new).any()


def test_prior_over_module_parameters():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1)
            self.linear.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

        def forward(self, x, y=None):
            # The bias has the particle dim on its left, beside a filler dim for the data.
            mean = (x @ self.linear.weight.T).squeeze(-1) + self.linear.bias.squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    model = Regression()
    guide = autoguide.AutoNormal(model)
    elbo = ImportanceWeightedELBO(4)
    with pytest.warns(UserWarning, match="'data' holds all the data but does not enclose the site"):
        elbo.loss_and_grads(model, guide, torch.randn(5, 2), torch.randn(5))
    elbo.check(model, guide, torch.randn(5, 2), torch.randn(5))


def test_convolutions_take_particles():
    decoder = LeadingDims(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1)), 3)
    image = torch.randn(3, 1, 5, 5)

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, 5, 5), 1.0).to_event(3))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(3), obs=image)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(image, 1.0).to_event(3))

    elbo = ImportanceWeightedELBO(4)
    elbo.check(model, guide)
    elbo.loss_and_grads(model, guide)
    assert decoder.module[0].weight.grad.abs().sum() > 0
