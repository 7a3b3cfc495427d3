"""The adapter alone, on whichever generation of ArviZ there is; needs neither torch nor Pyro.

python -m pytest --noconftest -o addopts= -o filterwarnings= tests/diagnostics/test_arviz_adapter.py
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "pyro_ext" / "diagnostics" / "arviz_adapter.py"
SPEC = importlib.util.spec_from_file_location("arviz_adapter", PATH)
adapter = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(adapter)

RNG = np.random.default_rng(0)
GROUPS = {
    "posterior": {"loc": RNG.normal(size=(2, 50)), "z": RNG.normal(size=(2, 50, 3, 4))},
    "log_likelihood": {"x": RNG.normal(size=(2, 50, 3))},
    "sample_stats": {"pareto_k": (("chain", "data"), RNG.normal(size=(2, 3)))},
    "observed_data": {"x": RNG.normal(size=3)},
    "constant_data": {},
}
DIMS = {"z": ("data",), "x": ("data",)}


def container(**coords):
    return adapter.to_container(GROUPS, DIMS, coords, {"made_by": "a test"})


def test_groups_dims_and_coords():
    found = container(data=["a", "b", "c"])
    assert set(adapter.group_names(found)) == GROUPS.keys() - {"constant_data"}
    posterior = adapter.group(found, "posterior")
    assert posterior["loc"].dims == ("chain", "draw")
    assert posterior["z"].dims == ("chain", "draw", "data", "z_dim_1")
    assert posterior["data"].values.tolist() == ["a", "b", "c"]
    assert posterior["draw"].values.tolist() == list(range(50))
    assert posterior.attrs["made_by"] == "a test"
    assert adapter.group(found, "sample_stats")["pareto_k"].dims == ("chain", "data")
    assert adapter.group(found, "observed_data")["x"].dims == ("data",)
    np.testing.assert_array_equal(posterior["z"].values, GROUPS["posterior"]["z"])
    with pytest.raises(ValueError, match=r"no group 'prior'\. Their groups are"):
        adapter.group(found, "prior")


def test_bad_labels():
    with pytest.raises(ValueError, match="coords has 2 labels for 'data', whose size is 3"):
        container(data=["a", "b"])
    with pytest.raises(ValueError, match="dims has 2 names for 'x', whose shape"):
        adapter.to_container(GROUPS, {"x": ("a", "b")}, {}, {})
    groups = {"posterior": GROUPS["posterior"] | {"a": np.zeros((2, 4))}}
    with pytest.raises(ValueError, match="dim 'draw' has size 4 in 'a', but size 50"):
        adapter.to_container(groups, DIMS, {}, {})


def test_netcdf(tmp_path):
    pytest.importorskip("h5py")
    found = container(data=["a", "b", "c"])
    found.to_netcdf(tmp_path / "found.nc")
    loaded = adapter.arviz().from_netcdf(tmp_path / "found.nc")
    for name in GROUPS.keys() - {"constant_data"}:
        assert adapter.group(found, name).equals(adapter.group(loaded, name))


@pytest.mark.parametrize("k", [0.3, 0.7])
def test_pareto_k_of_pareto_weights(k):
    """Weights u^-k of uniform u have a tail of shape k; with the wrong sign k would be negative."""
    log_weights = -k * np.log(RNG.uniform(size=(20, 100_000)))
    smoothed, pareto_k = adapter.psis(log_weights)
    assert abs(pareto_k.mean() - k) < 0.1
    np.testing.assert_allclose(np.exp(smoothed).sum(-1), 1)
    # Largest stays largest, and the body of the weights is as it was.
    largest = np.take_along_axis(smoothed, log_weights.argmax(-1)[:, None], -1)
    np.testing.assert_array_equal(largest[:, 0], smoothed.max(-1))
    order = log_weights.argsort(-1)
    body = np.take_along_axis(smoothed - log_weights, order[:, :50_000], -1)
    np.testing.assert_allclose(body, np.broadcast_to(body[:, :1], body.shape), atol=1e-9)


@pytest.mark.parametrize("num_draws", [7, 60])
def test_equal_weights_have_no_tail(num_draws):
    smoothed, pareto_k = adapter.psis(np.full((3, num_draws), -5.0))
    np.testing.assert_allclose(smoothed, -np.log(num_draws), atol=1e-12)
    np.testing.assert_array_equal(pareto_k, 0)


def test_weights_with_a_tail_too_short_to_fit_are_left():
    log_weights = RNG.normal(size=(2, 3, 10))
    smoothed, pareto_k = adapter.psis(log_weights)
    total = np.log(np.exp(log_weights).sum(-1, keepdims=True))
    np.testing.assert_allclose(smoothed, log_weights - total, atol=1e-12)
    assert pareto_k.shape == (2, 3)
    assert np.isinf(pareto_k).all()


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ with a newer pandas
def test_elpd_data_is_compared():
    import xarray as xr

    found = {}
    for name, shift in (("good", 0.0), ("bad", -1.0)):
        elpd = xr.DataArray(RNG.normal(size=30) / 10 - 1 + shift, dims=("data",))
        found[name] = adapter.elpd_data(elpd, 1.5, 0 * elpd + 0.2, 1000)
    table = adapter.arviz().compare(found)
    assert list(table.index) == ["good", "bad"]
    assert "1000" in str(found["good"])


def test_the_container_runs_through_loo_and_summary():
    arviz = adapter.arviz()
    log_likelihood = -1 + 0.1 * RNG.normal(size=(1, 500, 8))
    groups = {
        "posterior": {"loc": RNG.normal(size=(1, 500))},
        "log_likelihood": {"x": log_likelihood},
        "observed_data": {"x": np.zeros(8)},
    }
    found = adapter.to_container(groups, {"x": ("data",)}, {}, {})
    assert np.isfinite(arviz.loo(found).se)
    assert "loc" in arviz.summary(found, kind="stats").index
