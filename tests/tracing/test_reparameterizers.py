"""Sites that a reparameteriser of Pyro leaves behind are neither latent nor data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import (
    ConjugateReparam,
    HaarReparam,
    LocScaleReparam,
    ProjectedNormalReparam,
    StableReparam,
    StudentTReparam,
    SymmetricStableReparam,
    TransformReparam,
)

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence

X = torch.tensor([0.3, -1.0, 2.0])


def latent_of(prior):
    """A model with one local latent site for each data point."""

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 3):
            z = pyro.sample("z", prior(scale))
            pyro.sample("x", dist.Normal(z if z.shape[-1:] != (2,) else z[..., 0], 1.0), obs=X)

    return model


def walk():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0).to_event(1), obs=X)


#: name -> (model, the reparameteriser of z)
REPARAMETERIZED = {
    "loc-scale": (latent_of(lambda s: dist.Normal(0.0, s)), LocScaleReparam()),
    "loc-scale, centered": (latent_of(lambda s: dist.Normal(0.0, s)), LocScaleReparam(0.0)),
    "Student's t": (latent_of(lambda s: dist.StudentT(3.0, 0.0, s)), StudentTReparam()),
    "stable": (latent_of(lambda s: dist.Stable(1.5, 0.1, s)), StableReparam()),
    "symmetric stable": (latent_of(lambda s: dist.Stable(1.5, 0.0, s)), SymmetricStableReparam()),
    "transformed": (
        latent_of(lambda s: dist.TransformedDistribution(dist.Normal(0.0, s), [])),
        TransformReparam(),
    ),
    "projected normal": (
        latent_of(lambda s: dist.ProjectedNormal(s.unsqueeze(-1) * torch.ones(2))),
        ProjectedNormalReparam(),
    ),
    "Haar": (walk, HaarReparam(dim=-1)),
}


@pytest.mark.parametrize(("model", "reparam"), REPARAMETERIZED.values(), ids=REPARAMETERIZED)
def test_the_latent_is_exported_as_such_and_scored_as_by_pyro(model, reparam):
    model = poutine.reparam(model, {"z": reparam})
    guide = AutoNormal(model)
    losses = []
    for elbo in (Trace_ELBO(max_plate_nesting=1), ImportanceWeightedELBO(1, max_plate_nesting=1)):
        guide()
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    data = from_pyro_svi(model, guide, num_samples=5, posterior_predictive=True, prior=True)
    assert set(group(data, "observed_data")) == {"x"}
    assert {"z", *(["scale"] if model.fn is not walk else [])} <= set(group(data, "posterior"))
    assert set(group(data, "posterior_predictive")) == {"x"}
    assert group(data, "posterior")["z"].shape[1] == 5


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("K", [1, 4])
def test_an_exact_conjugate_update_leaves_nothing_to_chance(K, rule, vectorize):
    count = torch.tensor(3.0)

    def model():
        p = pyro.sample("p", dist.Beta(0.5, 1.5))
        pyro.sample("count", dist.Binomial(10, p), obs=count)

    update = ConjugateReparam(dist.Beta(1 + count, 11 - count))
    model = poutine.reparam(model, {"p": update})
    exact = dist.BetaBinomial(0.5, 1.5, 10).log_prob(count).item()
    elbo = ImportanceWeightedELBO(K, rule, vectorize)
    assert elbo.loss_and_grads(model, lambda: None) == pytest.approx(-exact, rel=1e-5)

    evidence = estimate_evidence(
        model, lambda: None, num_samples=6, chunk_size=3 if vectorize else 1
    )
    assert evidence.total == pytest.approx(exact, rel=1e-5)

    data = from_pyro_svi(model, lambda: None, num_samples=50, chunk_size=25 if vectorize else 1)
    assert set(group(data, "observed_data")) == {"count"}
    assert group(data, "posterior")["p"].std() > 0


@pytest.mark.parametrize("K", [1, 4])
def test_an_observed_site_under_do_keeps_its_likelihood(K):
    """A counterfactual: condition, then intervene."""

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(u, 0.5))
        pyro.sample("y", dist.Normal(w + u, 1.0), obs=torch.tensor(4.0))

    conditioned = poutine.condition(model, data={"w": torch.tensor(2.0)})
    twin = poutine.do(conditioned, data={"w": torch.tensor(3.0)})

    def guide():
        pyro.sample("u", dist.Delta(torch.tensor(0.7)))

    u = torch.tensor(0.7)
    expected = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 0.5).log_prob(torch.tensor(2.0))
    expected = expected + dist.Normal(3.0 + u, 1.0).log_prob(torch.tensor(4.0))
    assert ImportanceWeightedELBO(K).loss(twin, guide) == pytest.approx(-expected.item(), rel=1e-5)
