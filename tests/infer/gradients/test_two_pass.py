"""Chunks of particles: the gradients of all, the memory of one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.infer.gradients.two_pass import linearize
from pyro_ext.tracing import Programs
from pyro_ext.tracing.leaves import Leaves
from tests.models import NormalNormal
from tests.registry import ESTIMATORS

F64 = {"dtype": torch.float64}
# Chunks of 4 x 16 normal draws take the same numbers from the generator as one call does.
X = torch.linspace(-2, 2, 16, **F64)


def model(x):
    weight = pyro.param("weight", lambda: torch.randn((), **F64))
    pyro.factor("regularizer", -weight.square())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)


def guide(x):
    slope = pyro.param("slope", lambda: torch.randn((), **F64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1.0))


def step(elbo, model, guide):
    pyro.set_rng_seed(1)
    loss = elbo.loss_and_grads(model, guide, X)
    found = {name: p.grad.clone() for name, p in pyro.get_param_store().named_parameters()}
    for _, p in pyro.get_param_store().named_parameters():
        p.grad = None
    return loss, found


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_gradients_are_those_of_all_particles(make, smallest, rule, vectorize):
    options = {"gradient": rule, "vectorize_particles": vectorize}
    whole = make(12, **options)
    whole.loss(model, guide, X)
    expected_loss, expected = step(whole, model, guide)
    for size in (1, 4, 5):  # 5 leaves a rest
        chunked = make(12, particle_chunk_size=size, **options)
        chunked.loss(model, guide, X)
        loss, found = step(chunked, model, guide)
        assert loss == pytest.approx(expected_loss, rel=1e-12)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)
        pyro.set_rng_seed(1)
        assert chunked.loss(model, guide, X) == pytest.approx(expected_loss, rel=1e-12)


def test_two_thousand_particles_in_chunks_of_fifty():
    whole = ImportanceWeightedELBO(2000, max_plate_nesting=1)
    whole.loss(model, guide, X)
    expected_loss, expected = step(whole, model, guide)
    chunked = ImportanceWeightedELBO(2000, particle_chunk_size=50, max_plate_nesting=1)
    chunked.loss(model, guide, X)
    loss, found = step(chunked, model, guide)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


def test_both_passes_of_a_first_step_draw_the_same():
    """Initial values are drawn before, for only the first run of all draws them."""
    seen = []

    def recording_guide(x):
        guide(x)

    def recording_model(x):
        with pyro.poutine.trace() as tracer:
            model(x)
        seen.append(tracer.trace.nodes["z"]["value"].detach())

    elbo = ImportanceWeightedELBO(12, particle_chunk_size=4)
    SVI(recording_model, recording_guide, pyro.optim.SGD({"lr": 0.1}), elbo).step(X)
    chunks = [z for z in seen if z.dim() == 2]  # other runs are of one particle
    first, second = torch.stack(chunks[:3]), torch.stack(chunks[3:])
    assert torch.equal(first, second)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_chunks_and_passes_share_the_minibatch(vectorize):
    """With the exact posterior the loss is that of one minibatch whatever the noise."""
    programs = NormalNormal(X, subsample_size=3, exact_guide=True)
    seen = []

    def guide():
        with programs.plate() as index:
            seen.append(tuple(index.tolist()))
            slope = pyro.param("half", torch.tensor(0.5, **F64))
            pyro.sample("z", dist.Normal(slope * X[index], math.sqrt(0.5)))

    elbo = ImportanceWeightedELBO(
        7, particle_chunk_size=3, vectorize_particles=vectorize, max_plate_nesting=1
    )
    elbo.loss_and_grads(programs.model, guide)
    seen.clear()
    loss = elbo.loss_and_grads(programs.model, guide)
    assert len(set(seen)) == 1
    x = X[list(seen[0])]
    expected = dist.Normal(x.new_zeros(()), math.sqrt(2)).log_prob(x).sum().item() * 16 / 3
    assert loss == pytest.approx(-expected)


def test_discrete_sites_in_chunks():
    logit = torch.zeros(16, **F64, requires_grad=True)

    def discrete_model():
        with pyro.plate("data", 16):
            k = pyro.sample("k", dist.Bernoulli(torch.full((16,), 0.3, **F64)))
            pyro.sample("x", dist.Normal(k, 1.0), obs=X)

    def discrete_guide():
        with pyro.plate("data", 16):
            pyro.sample("k", dist.Bernoulli(logits=logit))

    found = []
    for options in ({}, {"particle_chunk_size": 4}):
        elbo = ImportanceWeightedELBO(12, max_plate_nesting=1, **options)
        elbo.loss(discrete_model, discrete_guide)
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(discrete_model, discrete_guide)
        found.append(logit.grad.clone())
        logit.grad = None
    torch.testing.assert_close(*found)


def test_errors():
    with pytest.raises(ValueError, match="particle_chunk_size must be at least 1, but it is 0"):
        ImportanceWeightedELBO(4, particle_chunk_size=0)
    elbo = ImportanceWeightedELBO(4, particle_chunk_size=2)
    with pytest.raises(
        NotImplementedError, match=r"particle_chunk_size=2, .* Use loss_and_grads or SVI"
    ):
        elbo.differentiable_loss(model, guide, X)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="site 'z' of the guide is"),
    ):
        elbo.loss_and_grads(model, guide, X * math.nan)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("options", [{"max_plate_nesting": 1}, {"vectorize_particles": False}])
def test_a_first_step_draws_initial_values_before_the_passes(options):
    # Chunks and no chunks: the same initial values, then the same noise, hence the same step.
    found = []
    for size in (4, None):
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        elbo = ImportanceWeightedELBO(12, particle_chunk_size=size, **options)
        if size is None:
            elbo.tracer.run_first(Programs(model, guide, (X,)))
        loss = elbo.loss_and_grads(model, guide, X)
        params = dict(pyro.get_param_store().named_parameters())
        found.append([torch.tensor(loss, **F64), *(params[name].grad for name in sorted(params))])
    for chunked, whole in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-10)


def test_random_states_are_restored_if_a_rule_fails():
    class Failing:
        def leaves(self, bound):
            return Leaves.NOWHERE

        def objective(self, bound, particles):
            raise ZeroDivisionError

    elbo = ImportanceWeightedELBO(4, particle_chunk_size=2)
    elbo.loss(model, guide, X)
    passes = elbo._two_pass(Programs(model, guide, (X,)))
    log_w, _ = passes.weigh()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        passes.differentiate(Failing(), linearize(elbo, log_w, False), None)
    assert torch.equal(before, torch.get_rng_state())
