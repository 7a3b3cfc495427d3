"""Sites of every kind become arrays with named dims."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group
from tests.diagnostics.programs import X
from tests.models import NormalNormal


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_every_kind_of_site(chunk_size):
    """Discrete, deterministic, constrained, with event dims, in two plates and in none."""
    data = torch.randn(4, 3)

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.factor("penalty", -scale)
        probs = pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 4, dim=-2):
            k = pyro.sample("k", dist.Categorical(probs))
            pyro.deterministic("double", 2 * k)
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(k.float(), scale), obs=data)

    def guide():
        pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        pyro.sample("probs", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("k", dist.Categorical(torch.ones(3)))

    found = from_pyro_svi(
        model,
        guide,
        num_samples=20,
        chunk_size=chunk_size,
        coords={"rows": list("abcd")},
        dims={"probs": ["category"]},
        constant_data={"data": data},
    )
    posterior = group(found, "posterior")
    assert posterior["scale"].dims == ("chain", "draw")
    assert posterior["probs"].dims == ("chain", "draw", "category")
    assert posterior["k"].dims == ("chain", "draw", "rows")
    np.testing.assert_array_equal(posterior["double"].values, 2 * posterior["k"].values)
    likelihood = group(found, "log_likelihood")
    assert list(likelihood) == ["x"]
    assert likelihood["x"].dims == ("chain", "draw", "rows", "columns")
    assert likelihood["rows"].values.tolist() == list("abcd")
    np.testing.assert_array_equal(group(found, "constant_data")["data"].values, data)
    assert group(found, "prior")["probs"].shape == (1, 20, 3)


@pytest.mark.parametrize("chunk_size", [1, 20])
def test_event_dims_of_data_outside_of_plates(chunk_size):
    y = torch.randn(3)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z.unsqueeze(-1) * torch.ones(3)
        pyro.sample("y", dist.MultivariateNormal(loc, torch.eye(3)), obs=y)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    found = from_pyro_svi(model, guide, num_samples=20, chunk_size=chunk_size)
    np.testing.assert_array_equal(group(found, "observed_data")["y"].values, y)
    assert group(found, "log_likelihood")["y"].shape == (1, 20)
    assert group(found, "posterior_predictive")["y"].shape == (1, 20, 3)


def test_a_deterministic_site_that_mixes_draws_is_refused():
    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        pyro.deterministic("edges", torch.arange(3.0))
        pyro.deterministic("total", z.sum())

    with pytest.raises(ValueError, match=r"deterministic site 'total' mixes the draws"):
        from_pyro_svi(model, NormalNormal(X).guide, num_samples=10)
    found = from_pyro_svi(model, NormalNormal(X).guide, num_samples=10, chunk_size=1)
    posterior = group(found, "posterior")
    np.testing.assert_allclose(posterior["total"].values, posterior["z"].values.sum(-1))
    assert posterior["edges"].shape == (1, 10, 3)
