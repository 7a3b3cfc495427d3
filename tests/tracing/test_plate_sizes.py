"""A plate without a size is the plate of its name in the other program."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.diagnostics import diagnose, from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence

X = torch.tensor([0.3, -1.0, 2.0])

# Pyro does not see a plate without a size.
pytestmark = pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")


def model_of(**size):
    def model():
        with pyro.plate("data", **size):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    return model


def guide_of(**size):
    def guide():
        with pyro.plate("data", **size):
            loc = pyro.param("loc", torch.zeros(3))
            other = pyro.param("other", torch.zeros(5, 7))  # has no dim of the plate
            pyro.sample("z", dist.Normal(loc + other.sum(), 1.0))

    return guide


def without_latents():
    with pyro.plate("data"):
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=X)


def nested():
    with pyro.plate("outer", dim=-2), pyro.plate("data", dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X.expand(2, 3))


def nested_guide():
    with pyro.plate("outer", 2, dim=-2), pyro.plate("data", dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2, 3), pyro.param("scale", torch.ones(()))))


#: name -> (model, guide, common shape)
PROGRAMS = {
    "in the guide": (model_of(size=3), guide_of(), (3,)),
    "in the model": (model_of(), guide_of(size=3), (3,)),
    "in both": (model_of(), guide_of(), (3,)),
    "without latents": (without_latents, lambda: None, (3,)),
    "nested": (nested, nested_guide, (2, 3)),
}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize(("model", "guide", "shape"), PROGRAMS.values(), ids=PROGRAMS)
def test_every_rule(model, guide, shape, rule, vectorize):
    pyro.set_rng_seed(0)
    expected = Trace_ELBO(max_plate_nesting=2).loss(model, guide)
    pyro.set_rng_seed(0)
    elbo = ImportanceWeightedELBO(1, rule, max_plate_nesting=2)
    assert elbo.loss_and_grads(model, guide) == pytest.approx(expected)

    elbo = ImportanceWeightedELBO(4, rule, vectorize)
    elbo.loss_and_grads(model, guide)
    assert elbo.trace_particles(model, guide).log_w.shape == (4, *shape)


@pytest.mark.parametrize(("model", "guide", "shape"), PROGRAMS.values(), ids=PROGRAMS)
def test_evidence_and_export(model, guide, shape):
    assert estimate_evidence(model, guide, num_samples=4).log_evidence.shape == shape
    data = from_pyro_svi(model, guide, num_samples=4, posterior_predictive=True)
    assert group(data, "observed_data")["x"].shape == shape
    assert group(data, "posterior_predictive")["x"].shape == (1, 4, *shape)
    diagnose(model, guide, num_samples=4)


def test_a_local_plate_without_a_size():
    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        pyro.sample("mean", dist.Normal(0.0, 1.0))
        guide_of()()

    particles = ImportanceWeightedELBO(5, local_plate="data").trace_particles(model, guide)
    assert particles.log_w.shape == (5, 3)


@pytest.mark.parametrize("K", [1, 3])
def test_a_subsampled_plate_needs_its_size_in_the_guide(K):
    def model():
        with pyro.plate("data", 30, subsample_size=3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    with pytest.raises(ValueError, match=r"'data' has no size in the guide.*\(3 of 30\)"):
        ImportanceWeightedELBO(K).loss(model, guide_of())


def test_other_plates_are_refused():
    def guide():
        with pyro.plate("other"):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with pytest.raises(ValueError, match="'z' is in the plates"):
        ImportanceWeightedELBO(3).loss(model_of(size=3), guide)


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
def test_a_site_of_size_one_in_a_larger_plate_is_shared():
    def model():
        with pyro.plate("data", dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        with pyro.plate("data", dim=-1):
            pyro.sample("z", dist.Normal(0.3, 0.5))  # near the posterior N(0.325, 0.5^2)

    pyro.set_rng_seed(0)
    expected = Trace_ELBO(max_plate_nesting=1).loss(model, guide)
    pyro.set_rng_seed(0)
    found = ImportanceWeightedELBO(1, max_plate_nesting=1).loss(model, guide)
    assert found == pytest.approx(expected)
    covariance = torch.eye(3) + 1
    exact = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X).item()
    for chunk_size in (100, 1):
        evidence = estimate_evidence(model, guide, num_samples=300, chunk_size=chunk_size)
        assert evidence.total == pytest.approx(exact, abs=0.02)


def test_a_size_that_is_a_tensor():
    def model():
        with pyro.plate("data", torch.tensor(3)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        with pyro.plate("data", torch.tensor(3)):
            pyro.sample("z", dist.Normal(X / 2, 1.0))

    assert ImportanceWeightedELBO(4).trace_particles(model, guide).log_w.shape == (4, 3)
