import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.diagnostics import diagnose
from tests.models import GlobalNormal, NormalNormal

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 1.0], dtype=torch.float64)


def guide_with(scale, shift=0.0):
    def guide():
        pyro.sample("z", dist.Normal(X.sum() / 6 + shift, scale))

    return guide


def test_the_exact_guide_has_no_gap():
    programs = GlobalNormal(X)
    found = diagnose(programs.model, programs.guide)
    exact = programs.log_evidence().item()
    for value in (found.elbo, found.log_evidence, found.jackknife):
        assert value == pytest.approx(exact)
    assert found.evidence_gap == pytest.approx(0, abs=1e-9)
    assert found.ess == pytest.approx(1000)
    assert "fits the posterior where its draws are" in repr(found)
    assert math.isnan(found.loss_change)


def test_a_gap_is_that_of_the_guide():
    """KL(N(m, s^2) | N(m, 1/6)) for s = 0.6."""
    found = diagnose(GlobalNormal(X).model, guide_with(0.6), num_samples=20_000, chunk_size=5000)
    ratio = 0.36 * 6
    gap = (ratio - 1 - math.log(ratio)) / 2
    assert found.evidence_gap == pytest.approx(gap, abs=0.05)
    assert found.jackknife == pytest.approx(GlobalNormal(X).log_evidence().item(), abs=0.05)


def test_a_narrow_guide_is_told():
    found = diagnose(GlobalNormal(X).model, guide_with(0.1), num_samples=5000)
    assert found.pareto_k > 0.7
    assert "misses a part of the posterior" in repr(found)


def test_local_latents():
    programs = NormalNormal(X)
    found = diagnose(programs.model, programs.guide, num_samples=2000)
    assert found.pareto_k_local.shape == (5,)
    assert found.log_evidence == pytest.approx(programs.log_evidence().sum().item(), abs=0.3)
    assert "for 0 of 5" in repr(found) or "for 1 of 5" in repr(found)


@pytest.mark.parametrize(
    ("curve", "word"),
    [
        (lambda t: 100 - 0.1 * t, "still falls"),
        (lambda t: 100 + 0.1 * t, "rises"),
        (lambda t: 100 + 50 * np.exp(-t / 20), "has settled"),
    ],
)
def test_loss_curves(curve, word):
    t = np.arange(1000)
    noise = np.random.default_rng(0).normal(size=1000)
    programs = GlobalNormal(X)
    found = diagnose(programs.model, programs.guide, losses=curve(t) + noise, num_samples=50)
    assert word in repr(found)
    with pytest.raises(ValueError, match="losses must be a sequence of at least 8 numbers"):
        diagnose(programs.model, programs.guide, losses=[1.0, 2.0], num_samples=50)


def test_predictions():
    """The model has a standard deviation of 1; data with 0.01 are too regular for it."""
    regular = 1 + 0.01 * torch.randn(40, dtype=torch.float64)
    for x, verdict in (
        (regular, "does not reproduce the data"),
        (torch.randn(40), "reproduces the data"),
    ):
        programs = GlobalNormal(x)
        found = diagnose(programs.model, programs.guide)
        assert verdict in repr(found)
    p_values = diagnose(
        programs.model, programs.guide, statistics={"median": lambda v: np.median(v, -1)}
    ).predictive_p_values
    assert list(p_values["x"]) == ["median"]
    assert 0.01 < p_values["x"]["median"] < 0.99


def test_masked_observations_do_not_count():
    x = torch.randn(40, dtype=torch.float64)
    kept = torch.arange(40) % 2 == 0
    padded = x.where(kept, math.nan)

    def masked():
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 40), pyro.poutine.mask(mask=kept):
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=padded)

    with pyro.validation_enabled(False):
        found = diagnose(masked, GlobalNormal(x[kept]).guide)
    assert "reproduces the data" in repr(found)
    assert all(0 < p < 1 for p in found.predictive_p_values["x"].values())


def test_a_guide_at_one_point_is_warned_of():
    def point():
        pyro.sample("z", dist.Delta(X.mean()))

    with pytest.warns(UserWarning, match="puts site 'z' at one point"):
        diagnose(GlobalNormal(X).model, point, num_samples=50)
