"""What is special to each bound: its limits, and where it lies."""

import pytest
import torch

from pyro_ext.infer import (
    CombinedELBO,
    MultiplyImportanceWeightedELBO,
    PartiallyImportanceWeightedELBO,
    ThermodynamicELBO,
    VariationalRenyiELBO,
)
from pyro_ext.ops import log_mean_exp

LOG_W = 2 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ELBO, IWAE = LOG_W.mean(0), log_mean_exp(LOG_W)

LIMITS = {
    "variational-renyi, alpha 0": (VariationalRenyiELBO(0.0, 6), IWAE),
    "combined, beta 0": (CombinedELBO(0.0, 6), IWAE),
    "combined, beta 1": (CombinedELBO(1.0, 6), ELBO),
    "multiply, one group": (MultiplyImportanceWeightedELBO(6, 1), IWAE),
    "multiply, six groups": (MultiplyImportanceWeightedELBO(6, 6), ELBO),
    "partially": (PartiallyImportanceWeightedELBO(6, 3), IWAE),
    "thermodynamic, one partition": (ThermodynamicELBO(6, 1), ELBO),
}


@pytest.mark.parametrize(("elbo", "expected"), LIMITS.values(), ids=LIMITS)
def test_limits(elbo, expected):
    torch.testing.assert_close(elbo.bound(LOG_W), expected)


def test_alpha_near_one_is_the_elbo():
    torch.testing.assert_close(
        VariationalRenyiELBO(1 - 1e-9, 6).bound(LOG_W), ELBO, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "elbo",
    [VariationalRenyiELBO(0.4, 6), CombinedELBO(0.4, 6), MultiplyImportanceWeightedELBO(6, 2)],
    ids=lambda elbo: type(elbo).__name__,
)
def test_lies_between_the_elbo_and_the_importance_weighted_bound(elbo):
    assert (elbo.bound(LOG_W) > ELBO).all()
    assert (elbo.bound(LOG_W) < IWAE).all()


def test_doubly_reparameterized_weights_of_the_variational_renyi_bound():
    """alpha v + (1 - alpha) v^2, with v normalised over w^(1 - alpha): Daudel et al. (2023)."""
    elbo = VariationalRenyiELBO(0.3, 6)
    first, second = elbo.derivatives(LOG_W)
    v = torch.softmax(0.7 * LOG_W, 0)
    torch.testing.assert_close(first - second, 0.3 * v + 0.7 * v**2)


def test_many_partitions_are_the_thermodynamic_integral():
    """The integral of E_beta[log w] over beta is the log mean weight, for weights at hand."""
    fine = ThermodynamicELBO(6, betas=torch.linspace(0, 1, 20_001).double().tolist())
    torch.testing.assert_close(fine.bound(LOG_W), IWAE, rtol=1e-3, atol=1e-3)
    coarse = ThermodynamicELBO(6, num_partitions=3)
    assert (coarse.bound(LOG_W) < IWAE).all()


def test_default_betas_are_spaced_in_their_logarithm():
    assert ThermodynamicELBO(2, 4).betas == pytest.approx((0.0, 0.01, 0.0464159, 0.2154435, 1.0))
    assert ThermodynamicELBO(2).betas == (0.0, 0.01, 1.0)


ERRORS = {
    "alpha 1": (lambda: VariationalRenyiELBO(1.0), "alpha must be below 1"),
    "negative alpha": (
        lambda: VariationalRenyiELBO(-0.1),
        "between 0 and 1, but it is -0.1",
    ),
    "beta 2": (lambda: CombinedELBO(2.0), "beta must be between 0 and 1, but it is 2.0"),
    "groups": (lambda: MultiplyImportanceWeightedELBO(5, 2), "num_groups=2 with num_particles=5"),
    "guide groups": (lambda: PartiallyImportanceWeightedELBO(5, 2), "num_groups=2 with num_parti"),
    "uneven weights": (
        lambda: MultiplyImportanceWeightedELBO(4, 2).bound(torch.zeros(3)),
        r"divisible by num_groups=2, but log_w has shape \(3,\)",
    ),
    "no partitions": (lambda: ThermodynamicELBO(2, 0), "num_partitions must be"),
    "betas down": (lambda: ThermodynamicELBO(2, betas=[0, 0.5, 0.2, 1]), "increase from 0 to 1"),
    "betas from 0.1": (lambda: ThermodynamicELBO(2, betas=[0.1, 1]), "increase from 0 to 1"),
    "one beta": (lambda: ThermodynamicELBO(2, betas=[0.0]), "increase from 0 to 1"),
    "both": (
        lambda: ThermodynamicELBO(2, 3, betas=[0, 1]),
        "num_partitions and betas were both given",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
