import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import loo
from pyro_ext.diagnostics.arviz_adapter import arviz
from tests.models import GlobalNormal, Hierarchical, NormalNormal

X = torch.linspace(-1.5, 2.5, 12, dtype=torch.float64)


def exact_loo(x, variance):
    """For theta ~ N(0, 1) and x | theta ~ N(theta, variance): log p(x_n | the others)."""
    precision = 1 + (len(x) - 1) / variance
    loc = (x.sum() - x) / variance / precision
    return dist.Normal(loc, math.sqrt(variance + 1 / precision)).log_prob(x)


def pointwise(found):
    return torch.tensor(getattr(found, "loo_i", getattr(found, "elpd_i", None)).values)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.5])
def test_corrects_for_the_guide(factor):
    programs = GlobalNormal(X)

    def guide():
        loc, scale = X.sum() / 13 + 0.1, factor / math.sqrt(13)
        pyro.sample("z", dist.Normal(loc, scale))

    found = loo(programs.model, guide, num_samples=10_000, chunk_size=1000)
    exact = exact_loo(X, 1.0)
    torch.testing.assert_close(pointwise(found), exact, rtol=0, atol=0.03)
    assert pointwise(found).sum() == pytest.approx(exact.sum().item(), abs=0.15)
    within = dist.Normal(X.sum() / 13, math.sqrt(1 + 1 / 13)).log_prob(X).sum()
    p_loo = getattr(found, "p_loo", getattr(found, "p", None))
    assert p_loo == pytest.approx((within - exact.sum()).item(), abs=0.1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:loo. Pareto k")
@pytest.mark.parametrize("vectorize", [True, False])
def test_integrates_local_latents_out(vectorize):
    """x | theta ~ N(theta, 2): the two latent layers of this model are known in closed form."""
    programs = Hierarchical(X, exact_guide=True)
    options = {"num_samples": 600, "num_local_samples": 20}
    if not vectorize:
        options = {"num_samples": 60, "num_local_samples": 10, "chunk_size": 1}
    found = loo(programs.model, programs.guide, **options)
    tolerance = 0.06 if vectorize else 0.25
    torch.testing.assert_close(pointwise(found), exact_loo(X, 2.0), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:loo. Pareto k")
@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ with a newer pandas
def test_models_are_compared():
    def wide():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z, 8.0), obs=X)

    programs = GlobalNormal(X)
    table = {
        "narrow": loo(programs.model, programs.guide, num_samples=500),
        "wide": loo(wide, programs.guide, num_samples=500),
    }
    assert list(arviz().compare(table).index) == ["narrow", "wide"]


def test_what_it_refuses():
    local = NormalNormal(X)
    with pytest.raises(ValueError, match=r"no global latent sites.*\['data'\].*held-out"):
        loo(local.model, local.guide, num_samples=10)
    hierarchical = Hierarchical(X, subsample_size=3)
    with pytest.raises(ValueError, match=r"plate 'data' is subsampled.*pass all of its rows"):
        loo(hierarchical.model, hierarchical.guide, num_samples=10)

    def two():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
            pyro.sample("y", dist.Normal(z, 1.0), obs=X)

    programs = GlobalNormal(X)
    with pytest.raises(ValueError, match=r"one of the observed sites \(x, y\), but it is None"):
        loo(two, programs.guide, num_samples=10)
    assert loo(two, programs.guide, num_samples=50, var_name="y")["n_data_points"] == 12
    with pytest.raises(TypeError, match=r"loo: the model is 3\. Pass an SVI, or a model"):
        loo(3)
    with pytest.raises(ValueError, match="num_local_samples must be"):
        loo(programs.model, programs.guide, num_local_samples=1)


def test_masked_observations_do_not_count():
    kept = torch.arange(12) % 3 != 0
    padded = X.where(kept, 0.0)

    def masked():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        with pyro.plate("data", len(X)), pyro.poutine.mask(mask=kept):
            pyro.sample("x", dist.Normal(z, 1.0), obs=padded)

    programs = GlobalNormal(X[kept])
    found = loo(masked, programs.guide, num_samples=4000)
    assert found["n_data_points"] == 8
    torch.testing.assert_close(pointwise(found), exact_loo(X[kept], 1.0), rtol=0, atol=0.03)
