"""Draws have all rows, whether plates are subsampled or not."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from tests.diagnostics.programs import X, pair
from tests.models import Hierarchical, NormalNormal


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 50])
@pytest.mark.parametrize("subsample_size", [None, 2])
def test_local_latents_over_all_rows(chunk_size, subsample_size):
    programs = NormalNormal(X, subsample_size=subsample_size, exact_guide=True)
    found = from_pyro_svi(*pair(programs), num_samples=80, chunk_size=chunk_size)
    posterior = group(found, "posterior")["z"]
    assert posterior.dims == ("chain", "draw", "data")
    assert posterior.shape == (1, 80, 5)
    error = posterior.values[0].mean(0) - X.numpy() / 2
    assert (np.abs(error) < 4.5 * math.sqrt(0.5 / 80)).all()
    statistics = group(found, "sample_stats")
    expected = programs.log_evidence().numpy()
    np.testing.assert_allclose(
        statistics["log_weight_local"].values, np.broadcast_to(expected, (1, 80, 5))
    )
    np.testing.assert_allclose(statistics["log_weight"].values, expected.sum())
    assert statistics["pareto_k_local"].dims == ("chain", "data")
    np.testing.assert_array_equal(group(found, "observed_data")["x"].values, X)


@pytest.mark.parametrize("subsample_size", [None, 2])
def test_globals_are_the_same_for_all_rows(subsample_size):
    programs = Hierarchical(X, subsample_size=subsample_size)
    found = from_pyro_svi(*pair(programs), num_samples=300, chunk_size=100)
    posterior = group(found, "posterior")
    theta, z = posterior["theta"].values[0], posterior["z"].values[0]
    assert (theta.shape, z.shape) == ((300,), (300, 5))
    assert len(np.unique(theta)) == 300
    residual = z - 0.4 * (theta[:, None] + X.numpy())  # the guide's mean
    assert (np.abs(residual.mean(0)) < 4.5 * 1.3 / math.sqrt(300)).all()
    assert (np.abs(residual.std(0) - 1.3) < 4.5 * 1.3 / math.sqrt(600)).all()
    log_weight = group(found, "sample_stats")["log_weight"].values[0]
    t = {"theta": torch.tensor(theta), "z": torch.tensor(z)}
    log_p = dist.Normal(0.0, 1.0).log_prob(t["theta"])
    log_p = log_p + dist.Normal(t["theta"][:, None], 1.0).log_prob(t["z"]).sum(1)
    log_p = log_p + dist.Normal(t["z"], 1.0).log_prob(X).sum(1)
    log_q = dist.Normal(0.1, 0.6).log_prob(t["theta"])
    loc = 0.4 * (t["theta"][:, None] + X)
    log_q = log_q + dist.Normal(loc, 1.3).log_prob(t["z"]).sum(1)
    np.testing.assert_allclose(log_weight, log_p - log_q, rtol=1e-5)


def test_subsampled_plates_that_cannot_be_visited():
    def ignores(x):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", 5, subsample_size=2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match=r"'x' observes .* Use the indices that the plate yields"):
        from_pyro_svi(ignores, guide, model_args=(X[:2],), num_samples=10)

    def sequential(x):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        for i in pyro.plate("data", 5, subsample_size=2):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="plate 'data' is subsampled and sequential"):
        from_pyro_svi(sequential, guide, model_args=(X,), num_samples=10)


def test_the_prior_of_a_subsampled_plate_has_all_rows_in_order():
    shifted = 100 * torch.arange(5.0)

    def model():
        with pyro.plate("data", 5, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + shifted[index], 1.0), obs=shifted[index])

    def guide():
        with pyro.plate("data", 5, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    found = from_pyro_svi(model, guide, num_samples=150, coords={"data": list("abcde")})
    for name in ("prior_predictive", "posterior_predictive"):
        rows = group(found, name)["x"].values[0].mean(0)
        np.testing.assert_allclose(rows, shifted, atol=4.5 * math.sqrt(2 / 150))
