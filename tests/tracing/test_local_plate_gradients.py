"""Gradients with a local plate are exact, and have the same mean under every rule."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.ops import log_mean_exp
from tests.models import Hierarchical
from tests.registry import EVERY_ESTIMATOR, VECTORIZE
from tests.statistics import assert_mean
from tests.tracing.local_replicates import (
    F64,
    REPLICATES,
    X,
    gradient,
    hierarchical_replicates,
    replicated,
)


@pytest.mark.long
@VECTORIZE
@EVERY_ESTIMATOR
def test_the_exact_posterior_gives_the_evidence_and_no_gradient(make, smallest, vectorize):
    programs = Hierarchical(X, exact_guide=True)
    for rule in ("pathwise", "stl", "dreg"):
        elbo = make(smallest + 2, gradient=rule, local_plate="data", vectorize_particles=vectorize)
        loss = elbo.differentiable_loss(programs.model, programs.guide)
        torch.testing.assert_close(-loss, programs.log_evidence())
        if rule != "pathwise":
            parameters = [p for _, p in pyro.get_param_store().named_parameters()]
            assert len(parameters) == 4
            for found in torch.autograd.grad(loss, parameters):
                assert found.abs().max() < 1e-10


@pytest.mark.long
@EVERY_ESTIMATOR
def test_rules_have_the_same_mean(make, smallest):
    """Paired, with the same noise, on the full data and under subsampling."""
    parameters = replicated(0.4, 0.6, 0.2, 0.9)
    K = max(smallest, 3)
    for subsample_size in (None, 2):
        model, guide = hierarchical_replicates(parameters, subsample_size)
        pathwise, dreg = (
            gradient(
                make(K, gradient=rule, max_plate_nesting=2, local_plate="data"),
                model,
                guide,
                parameters,
            )
            for rule in ("pathwise", "dreg")
        )
        assert_mean((dreg - pathwise)[..., 0].T, 0.0)


def test_looped_and_vectorized_gradients_have_the_same_mean():
    parameters = replicated(0.4, 0.6, 0.2, 0.9)
    model, guide = hierarchical_replicates(parameters)
    for rule in ("pathwise", "dreg"):
        looped, vectorized = (
            gradient(
                ImportanceWeightedELBO(
                    3, gradient=rule, vectorize_particles=v, max_plate_nesting=2, local_plate="data"
                ),
                model,
                guide,
                parameters,
                seed=int(v),
            )[..., 0].T
            for v in (False, True)
        )
        assert_mean(looped - vectorized, 0.0)


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_a_discrete_local_after_a_reparameterized_global_against_quadrature(rule):
    """theta ~ N(a, s), d | theta ~ Bernoulli(c + 2 theta), x | theta, d ~ N(theta + 1.5 d, 1)."""
    x = torch.tensor(0.9, **F64)
    a, s, c = replicated(0.3, 0.8, -0.5)
    standard = dist.Normal(x.new_zeros(()), 1.0)
    prior = dist.Bernoulli(torch.tensor(0.4, **F64))
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)

    def model():
        with replicates:
            theta = pyro.sample("theta", standard)
            with pyro.plate("data", 1, dim=-1):
                d = pyro.sample("d", prior)
                pyro.sample("x", dist.Normal(theta + 1.5 * d, 1.0), obs=x)

    def guide():
        with replicates:
            theta = pyro.sample("theta", dist.Normal(a, s))
            with pyro.plate("data", 1, dim=-1):
                pyro.sample("d", dist.Bernoulli(logits=c + 2 * theta))

    elbo = ImportanceWeightedELBO(2, gradient=rule, max_plate_nesting=2, local_plate="data")
    found = gradient(elbo, model, guide, [a, s, c])[..., 0].T

    one = [p[0, 0].detach().requires_grad_() for p in (a, s, c)]
    noise = torch.linspace(-8, 8, 401, **F64)
    mass = standard.log_prob(noise).exp() * (noise[1] - noise[0])
    theta = one[0] + one[1] * noise
    exact = (mass * (standard.log_prob(theta) - dist.Normal(*one[:2]).log_prob(theta))).sum()
    for pair in itertools.product([0.0, 1.0], repeat=2):
        d = torch.tensor(pair, **F64).unsqueeze(-1)
        log_q = dist.Bernoulli(logits=one[2] + 2 * theta).log_prob(d)
        log_p = prior.log_prob(d) + dist.Normal(theta + 1.5 * d, 1.0).log_prob(x)
        exact = exact + (mass * log_q.sum(0).exp() * log_mean_exp(log_p - log_q)).sum()
    assert_mean(found, torch.stack(torch.autograd.grad(exact, one)))


@VECTORIZE
def test_discrete_globals_and_locals_against_the_sum_over_all_values(vectorize):
    """g ~ Bernoulli(a), d | g ~ Bernoulli(b + c g), x | g, d ~ N(d + g, 1)."""
    x = torch.tensor(0.9, **F64)
    a, b, c = replicated(0.3, 0.4, -0.7)
    prior = dist.Bernoulli(torch.tensor(0.4, **F64))
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)

    def model():
        with replicates:
            g = pyro.sample("g", prior)
            with pyro.plate("data", 1, dim=-1):
                d = pyro.sample("d", prior)
                pyro.sample("x", dist.Normal(d + g, 1.0), obs=x)

    def guide():
        with replicates:
            g = pyro.sample("g", dist.Bernoulli(logits=a))
            with pyro.plate("data", 1, dim=-1):
                pyro.sample("d", dist.Bernoulli(logits=b + c * g))

    K = 2
    elbo = ImportanceWeightedELBO(
        K, max_plate_nesting=2, local_plate="data", vectorize_particles=vectorize
    )
    found = gradient(elbo, model, guide, [a, b, c])[..., 0].T

    one = [p[0, 0].detach().requires_grad_() for p in (a, b, c)]
    exact = 0.0
    for g in torch.tensor([0.0, 1.0], **F64):
        log_q_g = dist.Bernoulli(logits=one[0]).log_prob(g)
        inside = prior.log_prob(g) - log_q_g
        for values in itertools.product([0.0, 1.0], repeat=K):
            d = torch.tensor(values, **F64)
            log_q = dist.Bernoulli(logits=one[1] + one[2] * g).log_prob(d)
            log_p = prior.log_prob(d) + dist.Normal(d + g, 1.0).log_prob(x)
            inside = inside + log_q.sum().exp() * log_mean_exp(log_p - log_q)
        exact = exact + log_q_g.exp() * inside
    assert_mean(found, torch.stack(torch.autograd.grad(exact, one)))


@VECTORIZE
@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_one_particle_may_see_locals_outside_of_the_plate(rule, vectorize):
    """K = 1 is the ELBO: the global's gradient goes back to the local that it depends on."""
    a = torch.full((REPLICATES, 1), 0.3, **F64, requires_grad=True)
    x = X[:3]

    def model():
        with pyro.plate("replicates", REPLICATES, dim=-2):
            theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES, dim=-2):
            with pyro.plate("data", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(a + 0.4 * x, 0.7))
            pyro.sample("theta", dist.Normal(0.8 * z.mean(-1, keepdim=True) + a, 0.5))

    found = [
        gradient(
            ImportanceWeightedELBO(
                1, gradient=rule, local_plate=plate, vectorize_particles=vectorize
            ),
            model,
            guide,
            [a],
        )
        for plate in ("data", None)
    ]
    torch.testing.assert_close(*found)


def test_looped_globals_with_a_cached_transform():
    """The first particle scores from the cache, later ones by the inverse."""

    def guide():
        exponential = dist.transforms.ExpTransform(cache_size=1)
        base = dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0)
        pyro.sample("theta", dist.TransformedDistribution(base, [exponential]))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    elbo = ImportanceWeightedELBO(3, local_plate="data", vectorize_particles=False)
    for _ in range(30):
        elbo.loss_and_grads(model, guide)


@pytest.mark.long
@pytest.mark.parametrize(
    "rule", ["dreg", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("pathwise", "stl"))]
)
def test_autoguides_train_to_the_posterior_of_the_global(rule):
    programs = Hierarchical(X.float(), subsample_size=2)
    guide = AutoNormal(programs.model)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    elbo = ImportanceWeightedELBO(3, gradient=rule, local_plate="data")
    svi = pyro.infer.SVI(programs.model, guide, optim, elbo)
    for _ in range(400):
        svi.step()
    # theta | x ~ N(sum x / (N + 2), 2 / (N + 2))
    assert guide.median()["theta"].item() == pytest.approx(X.sum().item() / 7, abs=0.25)
    elbo.check(programs.model, guide)


def test_captured_as_a_graph():
    programs = Hierarchical(X)
    elbo = ImportanceWeightedELBO(3, local_plate="data", max_plate_nesting=1)
    elbo.loss(programs.model, programs.guide)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]

    def step(_):
        loss = elbo.differentiable_loss(programs.model, programs.guide)
        return loss, *torch.autograd.grad(loss, parameters)

    with pyro.validation_enabled(False):
        graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(()))
    found = graph(torch.zeros(()))
    assert len(found) == 5
    assert all(x.isfinite().all() for x in found)
