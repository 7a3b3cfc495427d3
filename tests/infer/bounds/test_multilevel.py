"""The multilevel estimate: its mean, its cost, and its steps with a random number of particles."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import (
    CompiledSVI,
    EagerSVI,
    ImportanceWeightedELBO,
    MultilevelELBO,
    MultiSampleELBO,
)
from tests.infer.gradients.estimates import F64
from tests.statistics import assert_mean


def probability(elbo, level):
    """P(J = level)."""
    above = 2 ** (-elbo.rate * (level + 1)) if level < elbo.max_level else 0.0
    return 2 ** (-elbo.rate * level) - above


@pytest.mark.parametrize(("first", "rate"), [(1, 1.5), (3, 1.5), (2, 1.0), (2, 0.4)])
def test_the_mean_is_the_bound_of_the_largest_level(first, rate):
    """For w ~ Gamma(a, 1), the log of the mean of K weights has the mean digamma(K a) - log K."""
    a, elbo = 1.5, MultilevelELBO(first, max_level=4, rate=rate)
    pyro.set_rng_seed(0)

    def mean_of_bound(K):
        return torch.digamma(torch.tensor(K * a, **F64)) - math.log(K)

    total = 0.0
    for level in range(5):
        log_w = dist.Gamma(torch.tensor(a, **F64), 1.0).sample((first << level, 20_000)).log()
        means = [mean_of_bound(first << lower) for lower in range(level + 1)]
        expected = means[0] + sum(
            2 ** (rate * lower) * (means[lower] - means[lower - 1]) for lower in range(1, level + 1)
        )
        assert_mean(elbo.bound(log_w), expected)
        total += probability(elbo, level) * expected
    assert total == pytest.approx(mean_of_bound(first << 4).item(), abs=1e-12)


def test_the_levels_have_their_probabilities_and_cost():
    elbo = MultilevelELBO(3, max_level=4, rate=0.8)
    pyro.set_rng_seed(0)
    drawn = []
    for _ in range(20_000):
        with elbo.held_level():
            drawn.append(elbo.num_particles)
    drawn = torch.tensor(drawn, **F64)
    assert elbo.num_particles == 3
    for level in range(5):
        assert_mean((drawn == 3 << level).double(), probability(elbo, level))
    assert_mean(drawn, elbo.expected_num_particles)


def test_the_level_is_held_and_released():
    elbo = MultilevelELBO(2, max_level=3, rate=0.1)
    pyro.set_rng_seed(1)
    with elbo.held_level():
        K = elbo.num_particles
        for _ in range(20):
            assert len(elbo.trace_particles(*gaussian()).log_w) == K
    sizes = {len(elbo.trace_particles(*gaussian()).log_w) for _ in range(50)}
    assert sizes == {2, 4, 8, 16}
    with pytest.raises(RuntimeError, match="stop"), elbo.held_level():
        raise RuntimeError("stop")
    assert elbo.num_particles == 2


def gaussian(slope=None, weight=None):
    x = torch.tensor([0.5, -1.0, 2.0], **F64)
    slope, weight = (x.new_tensor(v) if p is None else p for p, v in ((slope, 0.3), (weight, 0.8)))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 0.5), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(slope * x, 0.8))

    return model, guide


def test_the_gradient_of_the_model_has_the_mean_of_the_largest_level():
    weight = torch.full((3, 20_000), 0.8, **F64, requires_grad=True)  # one for each draw
    x = torch.tensor([0.5, -1.0, 2.0], **F64).unsqueeze(-1)

    def model():
        with pyro.plate("draws", 20_000), pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 0.5), obs=x)

    def guide():
        with pyro.plate("draws", 20_000), pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.3 * x, 0.8))

    def draws(elbo):
        return torch.autograd.grad(elbo.differentiable_loss(model, guide), weight)[0].sum(0)

    pyro.set_rng_seed(0)
    elbo = MultilevelELBO(2, max_level=3, rate=1.2)
    elbo.held_level = nullcontext
    of_levels = []
    for level in range(4):
        elbo.num_particles = 2 << level
        of_levels.append(probability(elbo, level) * draws(elbo))
    of_bound = draws(ImportanceWeightedELBO(16))
    difference = sum(of_levels) - of_bound
    assert_mean(difference, 0.0)
    first = draws(ImportanceWeightedELBO(2)) - of_bound
    error = difference.std() / 20_000**0.5
    assert first.mean().abs() > 9 * error  # so this test can fail


def test_the_learning_signal_is_that_of_the_base_class():
    pyro.set_rng_seed(0)
    elbo = MultilevelELBO(3, max_level=3)
    log_w = 2 * torch.randn(24, 5, **F64)
    expected = MultiSampleELBO.learning_signal(elbo, log_w)
    torch.testing.assert_close(elbo.learning_signal(log_w), expected)


@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_the_guide_is_trained_on_the_importance_weighted_bound(rule):
    slope = torch.tensor(0.3, **F64, requires_grad=True)
    model, guide = gaussian(slope=slope)
    elbo = MultilevelELBO(2, max_level=3, rate=0.3, gradient=rule, max_plate_nesting=1)
    for seed in range(5):
        pyro.set_rng_seed(seed)
        with elbo.held_level():
            K, state = elbo.num_particles, torch.get_rng_state()
            (found,) = torch.autograd.grad(elbo.differentiable_loss(model, guide), slope)
        torch.set_rng_state(state)
        bound = ImportanceWeightedELBO(K, gradient=rule, max_plate_nesting=1)
        (expected,) = torch.autograd.grad(bound.differentiable_loss(model, guide), slope)
        torch.testing.assert_close(found, expected)


def test_compiled_steps_draw_a_level_at_each_step():
    def trained(make):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def model():
            return gaussian(weight=pyro.param("weight", torch.tensor(0.8, **F64)))[0]()

        def guide():
            return gaussian(slope=pyro.param("slope", torch.tensor(0.3, **F64)))[1]()

        elbo = MultilevelELBO(2, max_level=2, rate=0.7, max_plate_nesting=1)
        svi = make(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        losses = torch.tensor([svi.step() for _ in range(60)], **F64)
        return svi, losses, pyro.param("weight").item(), pyro.param("slope").item()

    def compiled(*programs):
        return CompiledSVI(*programs, backend="eager")

    _, expected, *parameters = trained(EagerSVI)
    svi, losses, *found = trained(compiled)
    torch.testing.assert_close(losses, expected)
    assert found == pytest.approx(parameters)
    assert svi._graphs.count == 3
    svi.audit()
    assert math.isfinite(svi.evaluate_loss())


def test_chunks_have_the_same_loss():
    model, guide = gaussian()
    losses = []
    for size in (None, 3):
        elbo = MultilevelELBO(
            2, 3, 0.3, particle_chunk_size=size, vectorize_particles=False, max_plate_nesting=1
        )
        elbo.loss(model, guide)  # a first run may draw initial values
        pyro.set_rng_seed(4)
        losses.append(elbo.loss_and_grads(model, guide))
    assert losses[0] == pytest.approx(losses[1])


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_level must be at least 0, but it is -1"):
        MultilevelELBO(2, max_level=-1)
    with pytest.raises(TypeError, match=r"max_level must be an integer >= 0, but it is 2\.0"):
        MultilevelELBO(2, max_level=2.0)
    with pytest.raises(ValueError, match="rate must be positive and finite, but it is 0"):
        MultilevelELBO(2, rate=0)
    with pytest.raises(ValueError, match=r"must be 2 times a power of two up to 8, .*\(6,\)"):
        MultilevelELBO(2, max_level=3).bound(torch.zeros(6))
    with pytest.raises(ValueError, match="must be 2 times a power of two up to 8"):
        MultilevelELBO(2, max_level=3).bound(torch.zeros(32))
