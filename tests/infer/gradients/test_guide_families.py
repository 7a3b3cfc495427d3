"""Rules take autoguides, networks and flows as guides."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import nn

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO
from tests.infer.gradients.estimates import F64, assert_same_mean, gradient, stored_parameters
from tests.registry import VECTORIZE, PublishedJackknife


def positive_model():
    loc = pyro.param("loc", torch.tensor(0.3, **F64))
    with pyro.plate("data", 2):
        rate = pyro.sample("rate", dist.LogNormal(loc, torch.tensor(0.5, **F64)))
        pyro.sample("x", dist.Exponential(rate), obs=torch.tensor([0.4, 2.0], **F64))


def global_model():
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, **F64), 0.5))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
    x = torch.tensor([0.5, -1.0], **F64)
    pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)


def gaussian_model():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
    x = torch.tensor([0.5, -1.0], **F64)
    pyro.sample("x", dist.Normal(loc + loc.flip(-1) / 2, 1.0).to_event(1), obs=x)


def list_guide(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["scale"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["loc"])))
    return guide


AUTOGUIDES = {
    "AutoNormal": (positive_model, autoguide.AutoNormal),
    "AutoDiagonalNormal": (global_model, autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": (global_model, autoguide.AutoMultivariateNormal),
    # A flow starts wide: with a scale among the latents, the gradients would have heavy tails.
    "AutoIAFNormal": (gaussian_model, lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[8])),
    "AutoStructured": (
        global_model,
        lambda m: autoguide.AutoStructured(
            m,
            conditionals={"scale": "normal", "loc": "mvn"},
            dependencies={"loc": {"scale": "linear"}},
        ),
    ),
    "AutoDelta in a list": (global_model, list_guide),
}


@pytest.mark.long
@pytest.mark.parametrize(("model", "make_guide"), AUTOGUIDES.values(), ids=AUTOGUIDES)
@pytest.mark.parametrize(
    ("make", "K"),
    [
        (ImportanceWeightedELBO, 3),
        pytest.param(PublishedJackknife, 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("float64")
def test_autoguides(model, make_guide, make, K):
    assert_same_mean(make, K, model, make_guide(model), max_plate_nesting=1, num_seeds=80)


@pytest.mark.long
def test_a_transformed_guide_with_a_network_and_event_dims():
    x = torch.tensor([[0.5, 1.0], [-0.4, 0.2]], **F64).repeat(10, 1)
    encoder = nn.Linear(2, 4).double()

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        base = dist.Normal(loc, log_scale.exp())
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z", dist.TransformedDistribution(base, [transforms.ExpTransform()]).to_event(1)
            )

    assert_same_mean(ImportanceWeightedELBO, 3, model, guide, num_seeds=30, max_plate_nesting=1)


@VECTORIZE
@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_flows_without_an_inverse_are_refused_by_name(rule, vectorize):
    flow = transforms.Planar(2)

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    elbo = ImportanceWeightedELBO(2, gradient=rule, vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="Guide site 'z' has no density at a given value"):
        elbo.loss_and_grads(model, guide)
    assert all(p.grad is None for p in flow.parameters())
    plain = ImportanceWeightedELBO(2, vectorize_particles=vectorize)
    assert math.isfinite(plain.loss_and_grads(model, guide))


@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize(("model", "make_guide"), AUTOGUIDES.values(), ids=AUTOGUIDES)
@pytest.mark.usefixtures("float64")
def test_a_guide_with_a_bound_of_its_own_has_the_gradient_of_this_bound(model, make_guide, rule):
    """Also where its parameters reach the model through a Delta."""
    guide = make_guide(model)
    options = {"gradient": rule, "max_plate_nesting": 1}
    own = JackknifeELBO(4, 1, weights="nonnegative", **options)
    plain = ImportanceWeightedELBO(4, **options)
    stored_parameters(plain, model, guide)
    parameters = list(guide.parameters())
    for seed in range(3):
        found, expected = (gradient(e, model, guide, parameters, seed) for e in (own, plain))
        torch.testing.assert_close(found, expected)
