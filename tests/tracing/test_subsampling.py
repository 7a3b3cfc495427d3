"""The bound is the same on all data and under subsampling."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.tracing import ParticleTracer, Programs
from tests.models import GlobalNormal, NormalNormal
from tests.registry import ESTIMATORS, VECTORIZE
from tests.statistics import assert_mean, assert_mean_at_most
from tests.tracing.traced import X, particles


@pytest.mark.long
@pytest.mark.parametrize("K", [1, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_bound_is_the_same_full_and_subsampled_vectorized_and_looped(K):
    exact = NormalNormal(X).log_evidence().sum()
    means = {}
    for subsample_size in (None, 1, 3):
        for vectorize in (True, False):
            programs = NormalNormal(X, subsample_size)
            elbo = ImportanceWeightedELBO(K, vectorize_particles=vectorize, max_plate_nesting=1)
            num_draws = 200 if vectorize else 60
            draws = [-elbo.loss(programs.model, programs.guide) for _ in range(num_draws)]
            draws = torch.tensor(draws, dtype=torch.float64)
            assert_mean_at_most(draws, exact)
            means[subsample_size, vectorize] = draws.mean(), draws.var() / len(draws)
    for mean, variance in means.values():
        for other_mean, other_variance in means.values():
            assert (mean - other_mean).abs() < 4.5 * (variance + other_variance).sqrt()


def test_renyi_elbo_of_pyro_breaks_the_bound_that_ours_keeps():
    exact = NormalNormal(X).log_evidence().sum()
    programs = NormalNormal(X, subsample_size=1)
    theirs = RenyiELBO(alpha=0, num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    draws = torch.tensor([-theirs.loss(programs.model, programs.guide) for _ in range(400)])
    assert draws.mean() - exact > 4.5 * draws.std() / 20


@VECTORIZE
@pytest.mark.parametrize("subsample_size", [None, 3])
@pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_exact_posterior_gives_the_exact_evidence(make, smallest, subsample_size, vectorize):
    programs = NormalNormal(X, subsample_size, exact_guide=True)
    elbo = make(smallest + 2, vectorize_particles=vectorize, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    found = elbo.trace_particles(programs.model, programs.guide)
    minibatch = found.model_traces[0].nodes["x"]["value"]
    evidence = dist.Normal(X.new_zeros(()), math.sqrt(2)).log_prob(minibatch)
    torch.testing.assert_close(found.log_w, evidence.expand_as(found.log_w))
    pyro.set_rng_seed(3)
    loss = elbo.loss(programs.model, programs.guide)
    assert loss == pytest.approx(-len(X) / len(minibatch) * evidence.sum().item(), abs=1e-6)


def test_looped_particles_share_the_minibatch():
    found = particles(NormalNormal(X, 2).model, NormalNormal(X, 2).guide, 5, vectorize=False)
    first = found.model_traces[0].nodes["x"]["value"]
    for trace in found.model_traces:
        assert (trace.nodes["x"]["value"] == first).all()

    data_only = GlobalNormal(X, 2)  # the plate is in the model alone
    tracer = ParticleTracer(5, vectorize=False)
    traces = tracer.run(Programs(data_only.model, data_only.guide))
    first = traces.model_traces[0].nodes["x"]["value"]
    for trace in traces.model_traces:
        assert (trace.nodes["x"]["value"] == first).all()


@pytest.mark.long
def test_subsampled_bound_is_unbiased_for_the_full_one():
    """Every minibatch of one point, weighted by N / B, averages to the full evidence."""
    programs = NormalNormal(X, subsample_size=1, exact_guide=True)
    elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
    draws = [-elbo.loss(programs.model, programs.guide) for _ in range(400)]
    assert_mean(torch.tensor(draws), programs.log_evidence().sum())
