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
from tests.models import GlobalNormal, Hierarchical, NormalNormal

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 1.0], dtype=torch.float64)


def pair(programs):
    return programs.model, programs.guide


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


@pytest.mark.parametrize("chunk_size", [1, 50])
@pytest.mark.parametrize("subsample_size", [None, 2])
def test_local_latents_over_all_rows(chunk_size, subsample_size):
    programs = NormalNormal(X, subsample_size=subsample_size, exact_guide=True)
    found = from_pyro_svi(*pair(programs), num_samples=300, chunk_size=chunk_size)
    posterior = group(found, "posterior")["z"]
    assert posterior.dims == ("chain", "draw", "data")
    assert posterior.shape == (1, 300, 5)
    error = posterior.values[0].mean(0) - X.numpy() / 2
    assert (np.abs(error) < 4.5 * math.sqrt(0.5 / 300)).all()
    statistics = group(found, "sample_stats")
    expected = programs.log_evidence().numpy()
    np.testing.assert_allclose(
        statistics["log_weight_local"].values, np.broadcast_to(expected, (1, 300, 5))
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


def test_bad_input():
    programs = GlobalNormal(X)
    for options, message in (
        ({"num_samples": 1}, "num_samples must be"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"resample": "sir"}, "resample to be None or 'psis', got 'sir'"),
        ({"model_args": (1, 2)}, "arguments do not fit .* given 2 positional arguments"),
        ({"coords": {"data": [1, 2]}}, "coords of 'data': expected 5 labels, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            from_pyro_svi(*pair(programs), **{"num_samples": 10} | options)
    with pytest.raises(TypeError, match=r"from_pyro_svi: the model is 3\. Pass an SVI, or a model"):
        from_pyro_svi(3)

    def unobserved():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="expected an observed site in the model"):
        from_pyro_svi(unobserved, unobserved, num_samples=10)

    def diverged():
        with pyro.validation_enabled(False):
            pyro.sample("z", dist.Normal(X.new_tensor(math.nan), 1.0, validate_args=False))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match="got NaN at site 'z'"):
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
    assert "fitted to other data" in raised.value.__notes__[0]


def test_without_arviz_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'arviz>=0\.23'"):
        from_pyro_svi(*pair(GlobalNormal(X)))


def test_importing_the_package_imports_no_arviz():
    command = "import sys, pyro_ext.diagnostics, pyro_ext.infer; assert 'arviz' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True)


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


def test_a_deterministic_site_that_mixes_draws_is_refused():
    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        pyro.deterministic("edges", torch.arange(3.0))
        pyro.deterministic("total", z.sum())

    with pytest.raises(ValueError, match=r"deterministic site 'total'.*which it mixes"):
        from_pyro_svi(model, NormalNormal(X).guide, num_samples=10)
    found = from_pyro_svi(model, NormalNormal(X).guide, num_samples=10, chunk_size=1)
    posterior = group(found, "posterior")
    np.testing.assert_allclose(posterior["total"].values, posterior["z"].values.sum(-1))
    assert posterior["edges"].shape == (1, 10, 3)


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


def test_subsampled_plates_that_cannot_be_visited():
    def ignores(x):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", 5, subsample_size=2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))

    with pytest.raises(ValueError, match="observations that follow the indices it yields"):
        from_pyro_svi(ignores, guide, model_args=(X[:2],), num_samples=10)

    def sequential(x):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        for i in pyro.plate("data", 5, subsample_size=2):
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="got a sequential one that is subsampled"):
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
