"""Exports and diagnoses of programs that are unlike the examples."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo
from pyro_ext.diagnostics.arviz_adapter import group, group_names
from pyro_ext.infer import annealed_importance_sampling, estimate_evidence, estimate_expectation
from tests.models import Hierarchical

X = torch.tensor([0.3, -1.0, 2.0])


def local_model(x=X):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z.sum(-1)


def exact_guide(x=X):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def exact_evidence(x=X):
    return dist.Normal(0.0, 2**0.5).log_prob(x)


def observing_guide(x=X):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 3.0), obs=x, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def classifying_guide(x=X):
    """Has auxiliary observed sites of a discrete kind, too."""
    observing_guide(x)
    infer = {"is_auxiliary": True}
    pyro.sample("t", dist.Bernoulli(0.2), obs=torch.tensor(1.0), infer=infer)


@pytest.mark.filterwarnings("ignore:Found non-auxiliary")
@pytest.mark.parametrize("guide", [observing_guide, classifying_guide])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_guide_that_observes_auxiliary_sites(guide, chunk_size):
    found = estimate_evidence(local_model, guide, num_samples=6, chunk_size=chunk_size)
    torch.testing.assert_close(found.log_evidence.float(), exact_evidence())
    expected = float((X / 2).sum())
    mean = estimate_expectation(local_model, guide, num_samples=2000).value.item()
    assert mean == pytest.approx(expected, abs=4.5 * (1.5 / 2000) ** 0.5)
    annealed = annealed_importance_sampling(local_model, guide, num_chains=3, num_temperatures=3)
    torch.testing.assert_close(annealed.log_evidence.float(), exact_evidence())
    data = from_pyro_svi(local_model, guide, num_samples=6, chunk_size=chunk_size)
    assert group(data, "posterior_predictive")["x"].shape == (1, 6, 3)
    assert float(group(data, "sample_stats")["log_weight"].std()) < 1e-5
    assert diagnose(local_model, guide, num_samples=50).pareto_k == 0


def test_a_factor_of_the_guide_counts():
    def guide(x=X):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("correction", torch.full((len(x),), 0.5), has_rsample=True)

    found = estimate_evidence(
        local_model,
        poutine.infer_config(guide, lambda site: {"is_auxiliary": site["name"] == "correction"}),
        num_samples=4,
    )
    torch.testing.assert_close(found.log_evidence.float(), exact_evidence() - 0.5)


def without_latents():
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 1.0), obs=X)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_model_without_latents(chunk_size):
    options = {"num_samples": 30, "chunk_size": chunk_size}
    data = from_pyro_svi(without_latents, lambda: None, predictions=(), **options)
    assert {"posterior_predictive", "predictions", "log_likelihood", "observed_data"} <= set(
        group_names(data)
    )
    assert group(data, "predictions")["x"].shape == (1, 30, 3)
    expected = dist.Normal(0.5, 1.0).log_prob(X).numpy()
    np.testing.assert_allclose(group(data, "log_likelihood")["x"][0, 7], expected, rtol=1e-6)
    found = diagnose(without_latents, lambda: None, **options)
    assert found.elbo == pytest.approx(float(expected.sum()), rel=1e-6)
    assert "draws nothing, because the model has no latent sites" in repr(found)
    assert "data points" not in repr(found)


@pytest.mark.filterwarnings("ignore:The guide puts site 'z' at one point")
def test_a_guide_of_points_is_not_said_to_fit():
    found = diagnose(local_model, AutoDelta(local_model), num_samples=50)
    assert found.points == ("z",)
    assert "puts ['z'] at one point, so its weights tell nothing" in repr(found)
    assert "fits" not in repr(found)


def test_few_draws_are_no_verdict():
    assert "needs at least 21 draws" in repr(diagnose(local_model, exact_guide, num_samples=10))


@pytest.mark.filterwarnings("ignore:loo. Pareto k")
def test_half_precision():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.bfloat16), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1.0), obs=X.bfloat16())

    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(0.325, dtype=torch.bfloat16), 0.5))

    data = from_pyro_svi(model, guide, num_samples=40)
    assert group(data, "posterior")["z"].dtype == np.float32
    np.testing.assert_array_equal(group(data, "observed_data")["x"], X.bfloat16().float())
    assert np.isfinite(diagnose(model, guide, num_samples=40).log_evidence)
    assert np.isfinite(loo(model, guide, num_samples=40)["se"])


def test_dims_of_a_multivariate_observation():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            loc = z.unsqueeze(-1) * torch.ones(2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.zeros(3, 2))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 0.5))

    data = from_pyro_svi(
        model, guide, num_samples=4, dims={"x": ["axis"]}, coords={"axis": ["a", "b"]}
    )
    assert group(data, "observed_data")["x"].dims == ("data", "axis")
    assert group(data, "posterior_predictive")["x"].dims == ("chain", "draw", "data", "axis")
    assert group(data, "log_likelihood")["x"].dims == ("chain", "draw", "data")
    assert list(group(data, "observed_data").axis.values) == ["a", "b"]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_deterministic_sites_outside_of_plates(chunk_size):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        mean = pyro.deterministic("mean", a + X)
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.zeros(2, 3))

    def guide():
        pyro.sample("a", dist.Normal(0.0, 0.5))

    data = from_pyro_svi(model, guide, num_samples=6, chunk_size=chunk_size)
    posterior = group(data, "posterior")
    a, mean = posterior["a"].values, posterior["mean"].values
    np.testing.assert_allclose(mean.reshape(1, 6, 3), a[..., None] + X.numpy(), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Found non-auxiliary")
def test_deterministic_sites_of_the_guide():
    def guide(x=X):
        with pyro.plate("data", len(x)):
            loc = pyro.deterministic("loc", x / 2)
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    data = from_pyro_svi(local_model, guide, num_samples=4)
    assert set(group(data, "posterior")) == {"z", "loc"}
    np.testing.assert_allclose(group(data, "posterior")["loc"][0, 2], X / 2)


def test_observations_that_depend_on_draws_are_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("residual", dist.Normal(0.0, 1.0), obs=X - z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=X)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 0.5))

    for chunk_size in (None, 1):
        with pytest.warns(UserWarning, match=r"observed sites \['residual'\] depend on the draws"):
            data = from_pyro_svi(model, guide, num_samples=5, chunk_size=chunk_size)
        assert (
            set(group(data, "observed_data")) == set(group(data, "posterior_predictive")) == {"y"}
        )
        assert set(group(data, "log_likelihood")) == {"residual", "y"}


def test_a_likelihood_that_cannot_be_drawn():
    class Density(dist.Normal):
        def sample(self, sample_shape=()):
            raise NotImplementedError("no sampler")

        def rsample(self, sample_shape=()):
            raise NotImplementedError("no sampler")

        def expand(self, batch_shape, _instance=None):
            return super().expand(batch_shape, self._get_checked_instance(Density, _instance))

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", Density(z, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Normal(0.15, 0.5**0.5))

    with pytest.raises(ValueError, match=r"cannot draw its observations \(no sampler\)"):
        from_pyro_svi(model, guide, num_samples=4)
    from_pyro_svi(model, guide, num_samples=4, posterior_predictive=False, prior=False)
    with pytest.warns(UserWarning, match="There are no predictive p-values"):
        found = diagnose(model, guide, num_samples=30)
    assert found.predictive_p_values == {}
    assert found.pareto_k == 0


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
@pytest.mark.parametrize("value", [torch.full((3,), 0.5), 0.5], ids=["tensor", "number"])
def test_a_site_cut_off_by_do_is_neither_latent_nor_data(value):
    model = poutine.do(local_model, data={"z": value})
    expected = dist.Normal(0.5, 1.0).log_prob(X)
    found = estimate_evidence(model, lambda x=X: None, num_samples=3)
    assert found.total == pytest.approx(expected.sum().item(), rel=1e-5)
    data = from_pyro_svi(model, lambda x=X: None, num_samples=3)
    assert "posterior" not in group_names(data)
    assert set(group(data, "observed_data")) == {"x"}


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data", "ignore:loo. Pareto k")
def test_masked_rows_do_not_count_beside_local_latents():
    x = torch.cat([X, X])
    mask = torch.arange(6) < 3

    def model(x, mask):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, mask):
        pyro.sample("w", dist.Normal(0.2, 0.7))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    found = loo(model, guide, x, mask, num_samples=50, num_local_samples=10)
    assert found["n_data_points"] == len(found["pareto_k"]) == 3


def test_loo_warns_where_its_result_says_that_it_has_warned():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(w, 1.0), obs=X)

    def guide():
        pyro.sample("w", dist.Normal(3.0, 0.05))

    with pytest.warns(UserWarning, match=r"loo: Pareto k is above 0.57 for data points"):
        found = loo(model, guide, num_samples=200)
    assert found["warning"]
    joint = Hierarchical(X)
    with pytest.raises(ValueError, match="draws the latent sites in plate 'data' together"):
        loo(joint.model, AutoMultivariateNormal(joint.model), num_samples=10)


def test_a_minibatch_where_all_rows_belong():
    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30, subsample=x):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    for function in (from_pyro_svi, diagnose, loo):
        with pytest.raises(ValueError, match=r"plate 'data' has 3 of 30 rows.*all 30 rows"):
            function(model, AutoNormal(model), X, num_samples=4)
