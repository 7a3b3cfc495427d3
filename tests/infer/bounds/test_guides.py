"""Guides may be autoguides, lists of them, or have deterministic sites."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, autoguide

from pyro_ext.infer import ImportanceWeightedELBO
from tests.infer.bounds.data import X
from tests.models import NormalNormal
from tests.registry import VECTORIZE

AUTOGUIDES = {
    "AutoNormal": (autoguide.AutoNormal, True),
    "AutoDelta": (autoguide.AutoDelta, True),
    "AutoDiagonalNormal": (autoguide.AutoDiagonalNormal, False),
    "AutoMultivariateNormal": (autoguide.AutoMultivariateNormal, False),
    "AutoLowRankMultivariateNormal": (autoguide.AutoLowRankMultivariateNormal, False),
    "AutoIAFNormal": (lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[16]), False),
    "AutoStructured": (autoguide.AutoStructured, False),
    "AutoNormalMessenger": (autoguide.AutoNormalMessenger, True),
}


@VECTORIZE
@pytest.mark.parametrize(("make_guide", "keeps_plate"), AUTOGUIDES.values(), ids=AUTOGUIDES)
def test_autoguides_with_constrained_latents(make_guide, keeps_plate, vectorize):
    """The densities add up: the weights are those that Pyro's traces give."""
    x = X.float().abs()

    def model():
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            direction = pyro.sample("direction", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Exponential(rate * direction[..., 0]), obs=x)

    guide = make_guide(model)
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    if keeps_plate:
        found = elbo.trace_particles(model, guide)
    else:
        # One joint draw for all points has one density: separate weights would count it N times.
        with pytest.warns(UserWarning, match="'data' holds all the data but does not enclose"):
            found = elbo.trace_particles(model, guide)
    assert found.log_w.shape == ((3, len(x)) if keeps_plate else (3,))
    totals = zip(found.model_traces, found.guide_traces, strict=True)
    expected = sum(m.log_prob_sum() - g.log_prob_sum() for m, g in totals)
    torch.testing.assert_close(found.log_w.sum(), expected)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step()


@pytest.mark.long
def test_guide_list_and_a_latent_with_event_dims():
    def model(x):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(weight.sum((-2, -1)), noise), obs=x)

    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["noise"])))
    guide.append(autoguide.AutoMultivariateNormal(poutine.block(model, expose=["weight"])))
    for vectorize in (True, False):
        elbo = ImportanceWeightedELBO(5, vectorize_particles=vectorize)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        losses = [svi.step(torch.tensor(2.0)) for _ in range(100)]
        assert sum(losses[-20:]) < sum(losses[:20])


@VECTORIZE
@pytest.mark.filterwarnings("ignore:Found non-auxiliary vars in guide")
def test_deterministic_sites_in_the_guide(vectorize):
    def guide():
        with pyro.plate("data", len(X)):
            loc = pyro.deterministic("loc", X / 2)
            pyro.sample("z", dist.Normal(loc, math.sqrt(0.5)))

    programs = NormalNormal(X)
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    expected = -programs.log_evidence().sum().item()
    assert elbo.loss(programs.model, guide) == pytest.approx(expected)
