"""Log weights, their Pareto k, and draws drawn again."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from tests.diagnostics.programs import X, pair
from tests.models import GlobalNormal, NormalNormal


def test_resampling_corrects_the_guide():
    """Jointly for a global latent, point by point for local ones."""

    def guide():
        pyro.sample("z", dist.Normal(X.new_tensor(0.0), 0.7))

    programs = GlobalNormal(X)
    options = {"num_samples": 4000, "resample": "psis", "prior": False}
    found = from_pyro_svi(programs.model, guide, chunk_size=1000, **options)
    z = group(found, "posterior")["z"].values[0]
    assert abs(z.mean() - X.sum().item() / 6) < 0.03
    assert abs(z.std() - 1 / math.sqrt(6)) < 0.03
    expected = dist.Normal(torch.tensor(z)[:, None], 1.0).log_prob(X)
    np.testing.assert_allclose(group(found, "log_likelihood")["x"].values[0], expected)

    local = NormalNormal(X)  # guide N(0, 1.2), posteriors N(x / 2, 1 / 2)
    found = from_pyro_svi(*pair(local), chunk_size=1000, **options)
    z = group(found, "posterior")["z"].values[0]
    assert (np.abs(z.mean(0) - X.numpy() / 2) < 0.08).all()
    assert (np.abs(z.std(0) - math.sqrt(0.5)) < 0.08).all()
    expected = dist.Normal(torch.tensor(z), 1.0).log_prob(X)
    np.testing.assert_allclose(group(found, "log_likelihood")["x"].values[0], expected)


def test_pareto_k_tells_a_narrow_guide_from_a_matched_one():
    programs = GlobalNormal(X)

    def narrow():
        pyro.sample("z", dist.Normal(X.sum() / 6, 0.1))

    def matched():
        pyro.sample("z", dist.Normal(X.sum() / 6, 0.45))

    options = {"num_samples": 5000, "chunk_size": 5000, "prior": False}
    for guide, low, high in ((narrow, 0.7, math.inf), (matched, -math.inf, 0.5)):
        found = from_pyro_svi(programs.model, guide, **options)
        assert low < float(group(found, "sample_stats")["pareto_k"][0]) < high


def test_resampled_sites_stay_together():
    """Deterministic sites outside of the plates cannot, and statistics follow their draws."""

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.deterministic("twice", 2 * z, event_dim=0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        pyro.deterministic("total", z.sum(-1, keepdim=True))

    options = {"num_samples": 200, "prior": False}
    plain = from_pyro_svi(model, NormalNormal(X).guide, **options)
    z = group(plain, "posterior")["z"].values
    np.testing.assert_allclose(group(plain, "posterior")["total"].values, z.sum(-1))
    found = from_pyro_svi(model, NormalNormal(X).guide, resample="psis", **options)
    posterior = group(found, "posterior")
    np.testing.assert_array_equal(posterior["twice"].values, 2 * posterior["z"].values)
    assert "total" not in posterior
    assert "log_weight" not in group(found, "sample_stats")
    z = torch.tensor(posterior["z"].values)
    log_weight = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(X)
    log_weight = log_weight - dist.Normal(0.0, 1.2).log_prob(z)
    found_weight = group(found, "sample_stats")["log_weight_local"].values
    np.testing.assert_allclose(found_weight, log_weight, rtol=1e-5)


def test_scales_of_the_user_are_in_the_weights():
    """The target is that of SVI: the likelihood to the power of 1/4."""

    def model():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", 5), pyro.poutine.scale(scale=0.25):
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide():
        pyro.sample("z", dist.Normal(0.25 * X.sum() / 2.25, 1 / 1.5))

    found = from_pyro_svi(model, guide, num_samples=100)
    assert group(found, "sample_stats")["log_weight"].values.std() < 1e-6
    assert group(found, "sample_stats")["pareto_k"].values == 0
