"""Discrete sites have score-function gradients, with the learning signal of the bound."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO, MultiSampleELBO, ThermodynamicELBO
from pyro_ext.ops import jackknife, log_mean_exp
from tests.infer.gradients.estimates import F64, REPLICATES, gradient, replicated
from tests.registry import EVERY_ESTIMATOR, PublishedJackknife
from tests.statistics import assert_mean

BOUNDS = {
    "importance-weighted": (ImportanceWeightedELBO, log_mean_exp),
    "jackknife": (PublishedJackknife, lambda log_w: jackknife(log_w, 1)),
    "thermodynamic": (ThermodynamicELBO, ThermodynamicELBO(3).bound),
    "thermodynamic, linear": (partial(ThermodynamicELBO, num_partitions=1), lambda x: x.mean()),
}


@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize(("make", "bound"), BOUNDS.values(), ids=BOUNDS)
def test_bernoulli_latents_against_the_sum_over_all_tuples(make, bound, K):
    if K == 1 and make is PublishedJackknife:
        pytest.skip("the first order needs two particles")
    x = 0.8
    logit, weight = replicated(0.4, 1.5)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, **F64)))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=torch.tensor(x, **F64))

    def guide():
        with pyro.plate("replicates", REPLICATES):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    found = gradient(make(K), model, guide, [logit, weight], seed=0).view(2, -1).T

    one_logit, one_weight = (p[0].detach().requires_grad_() for p in (logit, weight))
    exact = 0.0
    for values in itertools.product([0.0, 1.0], repeat=K):
        z = torch.tensor(values, **F64)
        log_q = dist.Bernoulli(logits=one_logit).log_prob(z)
        log_p = dist.Bernoulli(torch.tensor(0.3, **F64)).log_prob(z)
        log_p = log_p + dist.Normal(one_weight * z, 1.0).log_prob(torch.tensor(x, **F64))
        exact = exact + log_q.sum().exp() * bound(log_p - log_q)
    expected = torch.stack(torch.autograd.grad(exact, [one_logit, one_weight]))
    assert_mean(found, expected)


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
@pytest.mark.parametrize("K", [1, 2])
def test_a_discrete_site_after_a_reparameterized_one_against_quadrature(rule, K):
    """z ~ N(a, s), d | z ~ Bernoulli(c + 2 z), x | z, d ~ N(z + 1.5 d, 1)."""
    x = torch.tensor(0.9, **F64)
    a, s, c = replicated(0.3, 0.8, -0.5)

    def log_p(z, d):
        log_prior = dist.Normal(x.new_zeros(()), 1.0).log_prob(z)
        log_prior = log_prior + dist.Bernoulli(torch.tensor(0.4, **F64)).log_prob(d)
        return log_prior + dist.Normal(z + 1.5 * d, 1.0).log_prob(x)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.4, **F64)))
            pyro.sample("x", dist.Normal(z + 1.5 * d, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Normal(a, s))
            pyro.sample("d", dist.Bernoulli(logits=c + 2 * z))

    elbo = ImportanceWeightedELBO(K, gradient=rule)
    found = gradient(elbo, model, guide, [a, s, c], seed=1).view(3, -1).T

    one = [p[0].detach().requires_grad_() for p in (a, s, c)]
    noise = torch.linspace(-8, 8, 401, **F64)
    mass = dist.Normal(noise.new_zeros(()), 1.0).log_prob(noise).exp() * (noise[1] - noise[0])
    z = one[0] + one[1] * noise
    log_w, q = [], []
    for d in (torch.zeros_like(z), torch.ones_like(z)):
        log_q_d = dist.Bernoulli(logits=one[2] + 2 * z).log_prob(d)
        log_w.append(log_p(z, d) - dist.Normal(one[0], one[1]).log_prob(z) - log_q_d)
        q.append(mass * log_q_d.exp())
    log_w, q = torch.cat(log_w), torch.cat(q)
    if K == 1:
        exact = (q * log_w).sum()
    else:
        pairs = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None, :]))
        exact = (q[:, None] * q[None, :] * log_mean_exp(pairs)).sum()
    expected = torch.stack(torch.autograd.grad(exact, one))
    assert_mean(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("vectorize", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["Categorical", "Poisson"])
def test_other_discrete_families_have_the_mean_of_the_elbo(family, vectorize):
    """One particle: the mean gradient is that of Trace_ELBO, which has its own score function."""
    parameter = torch.tensor([0.2, -0.3, 0.5], **F64, requires_grad=True)

    def make(p):
        return dist.Categorical(logits=p) if family == "Categorical" else dist.Poisson(p[0].exp())

    def model():
        k = pyro.sample("k", make(torch.zeros(3, **F64)))
        pyro.sample("x", dist.Normal(k.double(), 1.0), obs=torch.tensor(1.2, **F64))

    def guide():
        pyro.sample("k", make(parameter))

    ours = ImportanceWeightedELBO(1, vectorize_particles=vectorize)
    draws = [
        torch.stack([gradient(elbo, model, guide, [parameter], s) for s in range(500)])
        for elbo in (ours, Trace_ELBO())
    ]
    assert_mean(draws[0] - draws[1], 0.0)
    several = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
    assert gradient(several, model, guide, [parameter], 0).isfinite().all()


@pytest.mark.long
def test_renyi_elbo_of_pyro_has_no_guide_gradient_for_discrete_sites():
    logit = torch.tensor(0.4, **F64, requires_grad=True)
    prior_logit = torch.tensor(-0.5, **F64)

    def model():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("prior", prior_logit)))

    def guide():
        pyro.param("logit", logit)
        pyro.sample("z", dist.Bernoulli(logits=logit))

    theirs = RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    theirs.loss_and_grads(model, guide)
    assert logit.grad is None or logit.grad == 0
    ours = ImportanceWeightedELBO(4, max_plate_nesting=0)
    draws = torch.stack([gradient(ours, model, guide, [logit], s) for s in range(400)])
    assert draws.mean() < -4.5 * draws.std() / 20


@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_only_discrete_sites_are_refused(rule):
    logit = torch.tensor(0.4, requires_grad=True)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))

    elbo = ImportanceWeightedELBO(3, gradient=rule)
    assert math.isfinite(elbo.loss(model, guide))
    with pytest.raises(
        ValueError,
        match=r"a reparameterised site with parameters in the guide, but its sites \['z'",
    ):
        elbo.loss_and_grads(model, guide)
    assert logit.grad is None


@EVERY_ESTIMATOR
def test_signal_of_a_bound_is_its_definition(make, smallest):
    K = smallest + 2
    elbo = make(K)
    log_w = 3 * torch.randn(K, 4, **F64)
    signal = elbo.learning_signal(log_w)
    assert signal.shape == log_w.shape
    for k in range(K):
        replaced = log_w.clone()
        replaced[k] = torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)
        torch.testing.assert_close(signal[k], elbo.bound(log_w) - elbo.bound(replaced))
    torch.testing.assert_close(signal, MultiSampleELBO.learning_signal(elbo, log_w))


def test_signal_where_all_the_others_are_zero():
    elbo = ImportanceWeightedELBO(3)
    log_w = torch.tensor([-math.inf, 1.0, -math.inf], **F64)
    for signal in (elbo.learning_signal(log_w), MultiSampleELBO.learning_signal(elbo, log_w)):
        assert signal.isfinite().all()
        assert signal[1] == elbo.bound(log_w)
    assert elbo.learning_signal(log_w[1:2]) == elbo.learning_signal(log_w[1:2])
