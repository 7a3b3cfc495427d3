"""Linear bounds reward a non-reparameterised site without the other elements of its plates."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.rejection_exponential import RejectionExponential
from pyro.infer import Trace_ELBO

from pyro_ext.infer import (
    CombinedELBO,
    ImportanceWeightedELBO,
    MultiplyImportanceWeightedELBO,
    ThermodynamicELBO,
)
from tests.infer.gradients.estimates import gradient, stored_parameters
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean

N = 60
X = torch.linspace(-2, 2, N)


def beside_a_global():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        b = pyro.sample("b", dist.Bernoulli(torch.sigmoid(a)))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=X)


def guide_beside_a_global():
    a = pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.5))
    with pyro.plate("data", N):
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(N)) + a))


def nested_and_subsampled():
    with pyro.plate("groups", 5, dim=-2):
        rate = pyro.sample("rate", dist.Poisson(2.0))
        with pyro.plate("items", 4 * N, subsample_size=N, dim=-1) as rows:
            b = pyro.sample("b", dist.Bernoulli(0.3 * torch.ones(5, 1)))
            pyro.sample("x", dist.Normal(rate * b, 1.0), obs=X[rows % N])


def guide_nested_and_subsampled():
    with pyro.plate("groups", 5, dim=-2):
        pyro.sample("rate", dist.Poisson(pyro.param("rates", 1.0 + torch.arange(5.0))[:, None]))
        with pyro.plate("items", 4 * N, subsample_size=N, dim=-1):
            logit = pyro.param("logit", torch.tensor(0.2))
            pyro.sample("b", dist.Bernoulli(logits=logit.expand(5, N)))


def crossed_and_masked():
    rows, columns = pyro.plate("rows", 6, dim=-2), pyro.plate("columns", 7, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Categorical(torch.ones(3)))
    with columns, pyro.poutine.mask(mask=torch.arange(7) < 5):
        b = pyro.sample("b", dist.Categorical(torch.ones(3)))
    with rows, columns:
        pyro.sample("x", dist.Normal((a * b).float(), 1.0), obs=torch.ones(6, 7))


def guide_crossed_and_masked():
    logits = pyro.param("logits", torch.zeros(6, 1, 3)), pyro.param("others", torch.zeros(7, 3))
    with pyro.plate("rows", 6, dim=-2):
        pyro.sample("a", dist.Categorical(logits=logits[0]))
    with pyro.plate("columns", 7, dim=-1), pyro.poutine.mask(mask=torch.arange(7) < 5):
        pyro.sample("b", dist.Categorical(logits=logits[1]))


PROGRAMS = {
    "beside a global": (beside_a_global, guide_beside_a_global),
    "nested and subsampled": (nested_and_subsampled, guide_nested_and_subsampled),
    "crossed and masked": (crossed_and_masked, guide_crossed_and_masked),
}


def gradients(elbo, model, guide, num_seeds):
    parameters = stored_parameters(elbo, model, guide)
    draws = []
    for seed in range(num_seeds):
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide)  # unlike a differentiable loss, it takes chunks
        draws.append(torch.cat([p.grad.flatten() for p in parameters]))
        for p in parameters:
            p.grad = None
    return torch.stack(draws)


@pytest.mark.parametrize(("model", "guide"), PROGRAMS.values(), ids=PROGRAMS)
def test_one_particle_has_the_gradient_of_trace_elbo(model, guide):
    expected = gradients(Trace_ELBO(max_plate_nesting=2), model, guide, 3)
    for make, smallest in ESTIMATORS.values():
        if smallest == 1:
            found = gradients(make(1, max_plate_nesting=2), model, guide, 3)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


LINEAR = {
    "combined": lambda **options: CombinedELBO(1.0, 4, **options),
    "multiply-importance-weighted": lambda **o: MultiplyImportanceWeightedELBO(4, 4, **o),
    "thermodynamic": lambda **options: ThermodynamicELBO(4, 1, **options),
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"gradient": "dreg"}, marks=pytest.mark.slow),
        pytest.param({"vectorize_particles": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=() if name == "combined" else pytest.mark.slow)
        for name, make in LINEAR.items()
    ],
)
def test_several_particles_of_a_linear_bound(make, options):
    model, guide = PROGRAMS["beside a global"]
    elbo = make(max_plate_nesting=1, **options)
    assert elbo.is_linear
    found = gradients(elbo, model, guide, 200)
    one = gradients(ImportanceWeightedELBO(1, max_plate_nesting=1), model, guide, 800)
    # The same number of draws. Baselines from the other particles only lower the variance.
    assert (found.std(0) < 0.6 * one.std(0)).all()
    error = (found.var(0) / len(found) + one.var(0) / len(one)).sqrt()
    assert ((found.mean(0) - one.mean(0)).abs() <= 4.5 * error).all()


@pytest.mark.slow
def test_chunks_of_a_linear_bound_have_the_same_mean():
    model, guide = PROGRAMS["crossed and masked"]
    whole, chunks = (
        gradients(CombinedELBO(1.0, 4, max_plate_nesting=2, **options), model, guide, 400)
        for options in ({}, {"particle_chunk_size": 2})
    )
    assert_mean(chunks - whole, 0.0)


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_a_linear_bound_takes_a_subsampled_plate_beside_a_global(make):
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample_size=10) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X[rows])

    def guide():
        pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 0.3))

    make().loss_and_grads(model, guide)
    with pytest.raises(ValueError, match="'data' is subsampled"):
        CombinedELBO(0.9, 4).loss_and_grads(model, guide)


@pytest.mark.slow
def test_draws_that_leave_their_plate_are_rewarded_as_a_whole():
    """The elements of the plate depend on each other through t, which Trace_ELBO ignores."""
    logit = torch.tensor(1.0, requires_grad=True)

    def model():
        t = pyro.sample("t", dist.Bernoulli(0.5))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(logits=4 * t - 1))

    def guide():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
        pyro.sample("t", dist.Bernoulli(logits=9 * z.mean(-1) - 7))

    exact = 0.0
    for bits in itertools.product([0.0, 1.0], repeat=4):
        t, z = torch.tensor(bits[0]), torch.tensor(bits[1:])
        log_q = dist.Bernoulli(logits=logit).log_prob(z).sum()
        log_q = log_q + dist.Bernoulli(logits=9 * z.mean() - 7).log_prob(t)
        log_p = dist.Bernoulli(0.5).log_prob(t) + dist.Bernoulli(logits=4 * t - 1).log_prob(z).sum()
        exact = exact + log_q.exp() * (log_p - log_q)
    (expected,) = torch.autograd.grad(exact, [logit])

    elbo = ImportanceWeightedELBO(1, max_plate_nesting=1)
    draws = [gradient(elbo, model, guide, [logit], seed) for seed in range(4000)]
    assert_mean(torch.stack(draws), expected)


@pytest.mark.slow
def test_a_factor_that_stands_for_draws():
    """pyro.factor(..., has_rsample=False) is the density of draws that the guide made by itself."""
    logit = torch.tensor(0.3, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(2.0))

    def guide():
        q = dist.Bernoulli(logits=logit)
        b = q.sample()
        pyro.factor("q", q.log_prob(b), has_rsample=False)
        pyro.sample("z", dist.Delta(b))

    values = torch.tensor([0.0, 1.0])
    log_q = dist.Bernoulli(logits=logit).log_prob(values)
    log_p = torch.tensor(0.5).log() + dist.Normal(2 * values, 1.0).log_prob(torch.tensor(2.0))
    (expected,) = torch.autograd.grad((log_q.exp() * (log_p - log_q)).sum(), [logit])
    elbo = ImportanceWeightedELBO(1, max_plate_nesting=0)
    draws = [gradient(elbo, model, guide, [logit], seed) for seed in range(3000)]
    assert_mean(torch.stack(draws), expected)


@pytest.mark.filterwarnings("ignore:Found non-auxiliary")
@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_sites_drawn_by_rejection_need_the_pathwise_rule(rule):
    def model():
        pyro.sample("z", dist.Exponential(1.0))

    def guide():
        rate = pyro.param("rate", torch.tensor(1.4))
        pyro.sample("z", RejectionExponential(rate, torch.tensor(0.6)))

    ImportanceWeightedELBO(3).loss_and_grads(model, guide)
    with pytest.raises(ValueError, match=r"'z' is drawn by rejection.*gradient='pathwise'"):
        ImportanceWeightedELBO(3, rule).loss_and_grads(model, guide)
