"""A state refuses another model or guide, whatever kind of object makes the difference."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyro_ext.infer import EvidenceState, estimate_evidence

X = torch.linspace(-1.0, 2.0, 6)


def of_two(x, scale=1.0):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z + w, scale), obs=x)


def with_link(link):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(link(z), 1.0), obs=x)

    return model


def with_prior(prior):
    def model(x):
        z = pyro.sample("z", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def mixture(scale):
    components = dist.Normal(torch.tensor([-1.0, 1.0]), torch.tensor([1.0, scale]))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


def transformed(transform):
    return dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])


class Network(PyroModule):
    def __init__(self, scale):
        super().__init__()
        self.z = PyroSample(dist.Normal(0.0, scale))

    def forward(self, x):
        z = self.z
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


#: name -> the programs before and after
PAIRS = {
    "guide": ((of_two, AutoNormal(of_two)), (of_two, AutoMultivariateNormal(of_two))),
    "diagonal": ((of_two, AutoDiagonalNormal(of_two)), (of_two, AutoNormal(of_two))),
    "no guide": ((of_two, AutoNormal(of_two)), (of_two, None)),
    "partial": ((of_two, None), (functools.partial(of_two, scale=3.0), None)),
    "handler": ((of_two, None), (poutine.scale(of_two, 3.0), None)),
    "module": ((with_link(nn.Tanh()), None), (with_link(nn.Softplus()), None)),
    "function": ((with_link(torch.tanh), None), (with_link(torch.exp), None)),
    "sequential": (
        (with_link(nn.Sequential(nn.Tanh())), None),
        (with_link(nn.Sequential(nn.Softplus())), None),
    ),
    "class": (
        (with_prior(dist.Normal(0.0, 1.0)), None),
        (with_prior(dist.Laplace(0.0, 1.0)), None),
    ),
    "mixture": ((with_prior(mixture(1.0)), None), (with_prior(mixture(3.0)), None)),
    "transform": (
        (with_prior(transformed(dist.transforms.AffineTransform(0.0, 1.0))), None),
        (with_prior(transformed(dist.transforms.AffineTransform(0.0, 3.0))), None),
    ),
    "PyroSample": ((Network(1.0), None), (Network(9.0), None)),
}


@pytest.mark.filterwarnings("ignore:estimate_evidence. Pareto k", "ignore:Plate 'data' holds all")
@pytest.mark.parametrize("name", PAIRS)
def test_another_program_is_refused(name):
    before, after = PAIRS[name]
    state = EvidenceState()
    estimate_evidence(*before, X, num_samples=20, chunk_size=1, state=state)
    estimate_evidence(*before, X, num_samples=30, chunk_size=1, state=state)
    with pytest.raises(ValueError, match=r"is not what it was when the state began"):
        estimate_evidence(*after, X, num_samples=40, chunk_size=1, state=state)


def test_a_path_is_no_state():
    with pytest.raises(TypeError, match=r"state must be an EvidenceState, .*EvidenceState.load"):
        estimate_evidence(of_two, None, X, state="file.pt")
