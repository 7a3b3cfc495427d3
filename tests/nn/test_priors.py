"""Priors may be learnt, have hyperparameters, and follow the dtype."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ext.distributions import NormalScaleMixture
from pyro_ext.nn import BayesianModule, MeanFieldGuide
from tests.nn.networks import Classifier, data


def test_learnt_priors_are_followed():
    scale = nn.Parameter(torch.tensor(1.0))
    module = BayesianModule(nn.Linear(3, 2).double(), dist.Normal(0.0, scale))
    x = torch.randn(5, 3).double()
    for value in (1.0, 3.0):
        scale.data.fill_(value)
        trace = poutine.trace(copy.deepcopy(module) if value == 1.0 else module).get_trace(x)
        assert trace.nodes["weight"]["fn"].base_dist.scale.unique().item() == value
    module.prior = dist.Normal(0.0, 7.0)
    assert module.prior_of("weight").base_dist.scale.unique().item() == 7.0
    module.prior = dist.Normal(0.0, 8.0)
    assert module.prior_of("weight").base_dist.scale.unique().item() == 8.0


def test_hyperparameters_are_not_the_mean_field_guides():
    def prior(name, parameter):
        return dist.Normal(0.0, pyro.sample(f"{name}_scale", dist.Gamma(2.0, 1.0)))

    model = Classifier(nn.Linear(3, 2), prior)
    mean_field = MeanFieldGuide(model.net)

    def guide(x, y):
        for name in ("weight", "bias"):
            pyro.sample(f"{name}_scale", dist.Delta(torch.tensor(2.0)))
        mean_field(x, y)

    assert set(poutine.trace(mean_field).get_trace().stochastic_nodes) == {
        "net.weight",
        "net.bias",
    }
    assert Trace_ELBO().differentiable_loss(model, guide, *data((5, 3))).isfinite()


def test_priors_by_name_and_hyperparameters():
    def prior(name, parameter):
        scale = pyro.sample(f"{name}_scale", dist.HalfNormal(1.0))
        return dist.Normal(torch.zeros(parameter.shape), scale).to_event(parameter.dim())

    module = BayesianModule(nn.Linear(3, 2), prior)
    trace = poutine.trace(module).get_trace(torch.randn(5, 3))
    scale = trace.nodes["weight_scale"]["value"]
    assert torch.equal(trace.nodes["weight"]["fn"].base_dist.scale[0, 0], scale)


def test_dtype_follows_the_module():
    prior = NormalScaleMixture(torch.tensor([1.0, 0.1]), probs=torch.tensor([0.5, 0.5]))
    model = Classifier(nn.Linear(3, 2), prior).double()
    guide = MeanFieldGuide(model.net)
    x, y = data((5, 3))
    x = x.double()
    for values in (poutine.trace(model).get_trace(x), poutine.trace(guide).get_trace()):
        assert values.nodes["net.weight"]["value"].dtype == torch.float64
    assert Trace_ELBO().differentiable_loss(model, guide, x, y).dtype == torch.float64
    assert prior.scales.dtype == torch.float32
    model.float()
    assert poutine.trace(model).get_trace(x.float()).nodes["net.weight"]["value"].dtype == (
        torch.float32
    )


@pytest.mark.parametrize("transform", [dist.transforms.AffineTransform(torch.ones(()), 2.0)])
def test_transformed_priors_follow_too(transform):
    prior = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transform])
    module = BayesianModule(nn.Linear(3, 2), prior).double()
    trace = poutine.trace(module).get_trace(torch.randn(5, 3).double())
    assert trace.nodes["weight"]["value"].dtype == torch.float64
