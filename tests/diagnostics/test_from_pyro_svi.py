"""from_pyro_svi fills the groups of ArviZ from a fit."""

import math
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.diagnostics.arviz_adapter import group, group_names
from tests.diagnostics.programs import X, pair
from tests.models import GlobalNormal


@pytest.mark.parametrize("chunk_size", [1, 7, 400])
def test_a_conjugate_posterior(chunk_size):
    programs = GlobalNormal(X)
    found = from_pyro_svi(*pair(programs), num_samples=400, chunk_size=chunk_size)
    assert set(group_names(found)) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "prior",
        "prior_predictive",
        "observed_data",
        "sample_stats",
    }
    posterior = group(found, "posterior")
    assert posterior["z"].shape == (1, 400)
    error = posterior["z"].mean() - X.sum().item() / 6
    assert abs(error) < 4.5 / math.sqrt(6 * 400)
    z = posterior["z"].values[0]
    expected = dist.Normal(torch.tensor(z)[:, None], 1.0).log_prob(X)
    np.testing.assert_allclose(group(found, "log_likelihood")["x"].values[0], expected)
    assert group(found, "log_likelihood")["x"].dims == ("chain", "draw", "data")
    np.testing.assert_array_equal(group(found, "observed_data")["x"].values, X)
    predictive = group(found, "posterior_predictive")["x"].values[0]
    assert predictive.shape == (400, 5)
    residual = predictive - z[:, None]
    assert abs(residual.std() - 1) < 4.5 / math.sqrt(2 * residual.size)
    prior = group(found, "prior")["z"].values
    assert abs(prior.std() - 1) < 4.5 / math.sqrt(2 * prior.size)
    residual = group(found, "prior_predictive")["x"].values - prior[..., None]
    assert abs(residual.std() - 1) < 4.5 / math.sqrt(2 * residual.size)
    # The exact guide: the weight is the evidence, whatever the draw.
    statistics = group(found, "sample_stats")
    np.testing.assert_allclose(
        statistics["log_weight"].values, programs.log_evidence().item(), rtol=1e-10
    )
    assert statistics["pareto_k"].shape == (1,)


@pytest.mark.long
@pytest.mark.parametrize("auto_guide", [AutoNormal, AutoMultivariateNormal])
def test_a_fitted_svi(auto_guide, tmp_path):
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = X.float()
    svi = SVI(model, auto_guide(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    with pytest.raises(ValueError, match="the SVI has not been trained"):
        from_pyro_svi(svi, model_args=(x,))
    for _ in range(200):
        svi.step(x)
    found = from_pyro_svi(svi, model_args=(x,), num_samples=200, predictions=(torch.zeros(2),))
    posterior = group(found, "posterior")
    assert list(posterior) == ["loc", "scale"]  # and none of the guide's own sites
    assert group(found, "predictions")["x"].shape == (1, 200, 2)
    assert (posterior["scale"] > 0).all()

    pytest.importorskip("h5py")
    found.to_netcdf(tmp_path / "found.nc")
    from pyro_ext.diagnostics.arviz_adapter import arviz

    loaded = arviz().from_netcdf(tmp_path / "found.nc")
    for name in group_names(found):
        assert group(found, name).equals(group(loaded, name))


def test_several_runs_are_chains():
    first, second = GlobalNormal(X), GlobalNormal(X, exact_guide=False)
    found = from_pyro_svi([pair(first), pair(second)], num_samples=500)
    z = group(found, "posterior")["z"]
    assert z.shape == (2, 500)
    spread = z.values.std(1)
    assert spread[0] == pytest.approx(1 / math.sqrt(6), rel=0.2)
    assert spread[1] == pytest.approx(1, rel=0.2)
    assert group(found, "sample_stats")["pareto_k"].shape == (2,)


def test_given_arrays_and_groups_left_out():
    prior = {"z": torch.zeros(7)}
    found = from_pyro_svi(
        *pair(GlobalNormal(X)),
        num_samples=10,
        prior=prior,
        posterior_predictive=False,
        log_likelihood=False,
        predictions={"x": np.ones((7, 2))},
    )
    assert group(found, "prior")["z"].shape == (1, 7)
    assert group(found, "predictions")["x"].shape == (1, 7, 2)
    assert "posterior_predictive" not in group_names(found)
    assert "log_likelihood" not in group_names(found)


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 199, 500])
def test_predictions_go_with_the_posterior(chunk_size):
    def model(x, y=None):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(z, 0.1))
            pyro.sample("y", dist.Normal(w, 0.1), obs=y)

    def guide(x, y=None):
        pyro.sample("z", dist.Normal(X.new_tensor(0.3), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Normal(x, 0.5))

    options = {"num_samples": 200, "chunk_size": chunk_size, "prior": False}
    for predictions in ((torch.zeros(2),), ((), {"x": torch.zeros(2)})):
        found = from_pyro_svi(
            model,
            guide,
            model_args=(X, X),
            predictions=predictions,
            coords={"data": list("abcde")},
            **options,
        )
        z = group(found, "posterior")["z"].values
        y = group(found, "predictions")["y"].values
        assert y.shape == (1, 200, 2)
        assert abs((y - z[..., None]).std() - math.sqrt(0.02)) < 0.03


def test_bad_input():
    programs = GlobalNormal(X)
    for options, message in (
        ({"num_samples": 1}, "num_samples must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"resample": "sir"}, "resample must be None or 'psis', but it is 'sir'"),
        ({"model_args": (1, 2)}, "arguments do not fit .* passed 2 positional arguments"),
        ({"coords": {"data": [1, 2]}}, "coords has 2 labels for 'data', whose size is 5"),
    ):
        with pytest.raises(ValueError, match=message):
            from_pyro_svi(*pair(programs), **{"num_samples": 10} | options)
    with pytest.raises(TypeError, match=r"from_pyro_svi: the model is 3\. Pass an SVI, or a model"):
        from_pyro_svi(3)

    def unobserved():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the model has no observed site"):
        from_pyro_svi(unobserved, unobserved, num_samples=10)

    def diverged():
        with pyro.validation_enabled(False):
            pyro.sample("z", dist.Normal(X.new_tensor(math.nan), 1.0, validate_args=False))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site 'z' has NaN draws"):
        from_pyro_svi(programs.model, diverged, num_samples=10)


def test_a_guide_fitted_to_other_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(torch.zeros(3))
    with pytest.raises((ValueError, RuntimeError)) as raised:
        from_pyro_svi(model, guide, model_args=(torch.zeros(5),), num_samples=10)
    assert "An automatic guide has the plates of its first run" in str(raised.value)


def test_without_arviz_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'arviz>=0\.23'"):
        from_pyro_svi(*pair(GlobalNormal(X)))


@pytest.mark.long
def test_importing_the_package_imports_no_arviz():
    command = "import sys, pyro_ext.diagnostics, pyro_ext.infer; assert 'arviz' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)
