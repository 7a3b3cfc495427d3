"""Discrete sites are weighted, whether drawn or enumerated."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_ext.infer import KLWeightedELBO
from tests.infer.kl.objectives import LINEAR, ConstantKL
from tests.statistics import assert_mean


def discrete_pair():
    """A Bernoulli global and data; the exact weighted loss is a sum over two values."""
    x = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    theta = pyro.param("theta", x.new_tensor(0.3))

    def model():
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.4)))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z), obs=x)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta")))

    def exact(factor):
        loss = 0.0
        for z in (x.new_tensor(0.0), x.new_tensor(1.0)):
            log_q = dist.Bernoulli(logits=theta).log_prob(z)
            log_p = dist.Bernoulli(x.new_tensor(0.4)).log_prob(z)
            log_likelihood = dist.Bernoulli(0.2 + 0.5 * z).log_prob(x).sum()
            loss = loss + log_q.exp() * (factor * (log_q - log_p) - log_likelihood)
        return loss

    return model, guide, exact, theta


@pytest.mark.long
@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceGraph_ELBO", "ImportanceWeightedELBO"])
def test_score_function_gradients_have_the_mean_of_the_weighted_loss(name):
    model, guide, exact, theta = discrete_pair()
    (expected,) = torch.autograd.grad(exact(0.3), theta)
    elbo = KLWeightedELBO(LINEAR[name](), ConstantKL(0.3))
    gradients = []
    for _ in range(200):
        theta.grad = None
        elbo.loss_and_grads(model, guide)
        gradients.append(theta.grad.clone())
    assert_mean(torch.stack(gradients), expected)


def test_enumerated_sites_of_the_guide_are_exact():
    model, guide, exact, theta = discrete_pair()
    elbo = KLWeightedELBO(TraceEnum_ELBO(max_plate_nesting=1), ConstantKL(0.3))
    loss = elbo.loss_and_grads(model, config_enumerate(guide, "parallel"))
    assert loss == pytest.approx(exact(0.3).item(), rel=1e-12)
    (expected,) = torch.autograd.grad(exact(0.3), theta)
    torch.testing.assert_close(theta.grad, expected, rtol=1e-10, atol=0)


def test_enumerated_local_sites_of_the_model_have_no_kl_and_stay():
    x = torch.randn(6)
    in_parallel = {"enumerate": "parallel"}

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer=in_parallel)
            pyro.sample("x", dist.Normal(w + k, 1.0), obs=x)

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    def loss(elbo):
        pyro.set_rng_seed(1)
        return elbo.loss(model, guide)

    plain = TraceEnum_ELBO(max_plate_nesting=1)
    for sites in ("global", "all"):
        weighted = [
            loss(KLWeightedELBO(plain, ConstantKL(factor), sites)) for factor in (0.0, 1.0, 2.0)
        ]
        assert weighted[1] == pytest.approx(loss(plain), rel=1e-6)
        assert weighted[1] - weighted[0] == pytest.approx(weighted[2] - weighted[1], rel=1e-4)
    pyro.set_rng_seed(1)
    w = dist.Normal(0.1, 0.5).sample()
    kl = dist.Normal(0.1, 0.5).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w)
    assert weighted[1] - weighted[0] == pytest.approx(kl.item(), rel=1e-4)
