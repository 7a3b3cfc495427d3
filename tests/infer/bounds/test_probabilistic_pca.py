"""Estimates of the evidence of probabilistic PCA, which is exact, against one another."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    annealed_importance_sampling,
    estimate_evidence,
)
from pyro_ext.ops import jackknife, log_mean_exp

NUM_OBSERVED, NUM_LATENT, NUM_POINTS = 30, 8, 64


class ProbabilisticPCA:
    """z ~ N(0, 1) in 8 dims, x | z ~ N(W z, 1/4) in 30; data drawn from the model.

    The guide has the mean of the exact posterior and 1.2 times its marginal standard deviations.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight = normal(NUM_OBSERVED, NUM_LATENT)
        self.z = normal(NUM_POINTS, NUM_LATENT)
        self.x = self.z @ self.weight.T + 0.5 * normal(NUM_POINTS, NUM_OBSERVED)
        precision = torch.eye(NUM_LATENT).double() + 4 * self.weight.T @ self.weight
        covariance = precision.inverse()
        self.loc = 4 * self.x @ self.weight @ covariance
        self.scale = 1.2 * covariance.diagonal().sqrt()

    def model(self):
        with pyro.plate("data", NUM_POINTS):
            z = pyro.sample("z", dist.Normal(self.x.new_zeros(NUM_LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 0.5).to_event(1), obs=self.x)

    def guide(self):
        with pyro.plate("data", NUM_POINTS):
            pyro.sample("z", dist.Normal(self.loc, self.scale).to_event(1))

    def log_evidence(self):
        covariance = self.weight @ self.weight.T + torch.eye(NUM_OBSERVED).double() / 4
        return dist.MultivariateNormal(torch.zeros(NUM_OBSERVED).double(), covariance).log_prob(
            self.x
        )


PCA = ProbabilisticPCA()
PATHS = {"num_leapfrog_steps": 5, "max_plate_nesting": 1}


def test_reported_errors_are_those_made():
    found = estimate_evidence(PCA.model, PCA.guide, num_samples=5000, max_plate_nesting=1)
    z = (found.log_evidence - PCA.log_evidence()) / found.std_error
    assert 0.5 < z.square().mean() < 2
    assert abs(found.total - PCA.log_evidence().sum()) < 4.5 * found.total_std_error
    assert (found.pareto_k < 0.7).all()


@pytest.mark.long
def test_the_jackknife_takes_out_bias_at_eight_draws():
    """From 500 estimates a point: the bias of order 1 is under 0.6 of that of IWAE."""
    elbo = ImportanceWeightedELBO(8 * 500, max_plate_nesting=1)
    with torch.no_grad():
        log_w = elbo.trace_particles(PCA.model, PCA.guide).log_w.unflatten(0, (8, 500))
    exact = PCA.log_evidence()
    iwae = (log_mean_exp(log_w) - exact).mean(1)
    corrected = (jackknife(log_w, 1) - exact).mean(1)
    error = corrected.std() / len(corrected) ** 0.5
    assert iwae.mean() < -0.1
    assert corrected.mean().abs() + 4.5 * error < 0.6 * iwae.mean().abs()


@pytest.mark.long
def test_annealing_from_the_guide_finds_the_truth():
    found = annealed_importance_sampling(
        PCA.model, PCA.guide, num_chains=32, num_temperatures=30, **PATHS
    )
    error = found.log_evidence - PCA.log_evidence()
    assert error.mean().abs() < 0.05
    assert 0.5 < (error / found.std_error).square().mean() < 2
    assert abs(found.total - PCA.log_evidence().sum()) < 4.5 * found.total_std_error


@pytest.mark.long
def test_annealing_from_the_prior_brackets_the_truth():
    found = annealed_importance_sampling(
        PCA.model,
        num_chains=4,
        num_temperatures=40,
        exact_sample={"z": PCA.z},
        **PATHS,
    )
    # The totals lie outside of the bracket by b nats with probability e^-b.
    total = PCA.log_evidence().sum()
    assert found.total - 10 < total < found.upper.sum() + 10
    assert found.upper.sum() - found.total > 10


@pytest.mark.long
def test_annealing_agrees_with_importance_sampling():
    annealed = annealed_importance_sampling(
        PCA.model, PCA.guide, num_chains=16, num_temperatures=30, **PATHS
    )
    sampled = estimate_evidence(PCA.model, PCA.guide, num_samples=2000, max_plate_nesting=1)
    error = math.hypot(annealed.total_std_error, sampled.total_std_error)
    assert abs(annealed.total - sampled.total) < 4.5 * error
