import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group


@pytest.mark.parametrize("chunk_size", [1, 4, 14])
def test_deterministic_sites_of_the_prior_have_the_dim_of_the_draws(chunk_size):
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("z", dist.Normal(0.2, 0.7))

    prior = group(from_pyro_svi(model, guide, num_samples=14, chunk_size=chunk_size), "prior")
    assert prior["twice"].shape == (1, 14)
    np.testing.assert_array_equal(prior["twice"], 2 * prior["z"])
