"""Sites whose masks or rows differ between model and guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence
from tests.models import NormalNormal

X = torch.linspace(-2, 2, 8)

N = len(X)
MASK = torch.arange(N) < N - 2
PARTICLES = pytest.mark.parametrize("K", [1, 3])


def masked_model(mask, inside=False):
    def model():
        with pyro.plate("data", N):
            prior = dist.Normal(X.new_zeros(()), 1.0)
            with poutine.mask(mask=True if inside else mask):
                z = pyro.sample("z", prior.mask(mask) if inside else prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    return model


@pytest.mark.parametrize("mask", [True, False, torch.ones(N, dtype=torch.bool)], ids=str)
def test_masks_that_change_nothing_for_the_guide(mask):
    ImportanceWeightedELBO(3).loss(masked_model(mask), NormalNormal(X).guide)


@PARTICLES
@pytest.mark.parametrize("inside", [False, True], ids=["poutine", "distribution"])
def test_a_latent_masked_in_the_model_alone(inside, K):
    model = masked_model(MASK, inside)
    for guide in (NormalNormal(X).guide, AutoNormal(model), AutoMultivariateNormal(model)):
        with pytest.raises(ValueError, match="'z' has another mask in the guide than in the model"):
            ImportanceWeightedELBO(K).loss(model, guide)
        with pytest.raises(ValueError, match=r"'z' has another mask.*(same poutine.mask|by hand)"):
            estimate_evidence(model, guide, num_samples=2)


@PARTICLES
def test_a_latent_masked_in_the_guide_alone(K):
    guide = poutine.mask(NormalNormal(X).guide, mask=MASK)
    with pytest.raises(ValueError, match="'z' has another mask"):
        ImportanceWeightedELBO(K).loss(NormalNormal(X).model, guide)


@PARTICLES
def test_the_same_mask_in_both(K):
    guides = (
        poutine.mask(NormalNormal(X).guide, mask=MASK.clone()),
        poutine.mask(AutoNormal(masked_model(MASK)), mask=MASK),
        AutoDelta(masked_model(MASK)),  # a point has no log q
    )
    for guide in guides:
        ImportanceWeightedELBO(K).loss(masked_model(MASK, inside=True), guide)


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
@PARTICLES
def test_values_that_are_imputed_by_obs_mask(K):
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X, obs_mask=MASK)

    with pytest.raises(ValueError, match=r"'x_unobserved' has another mask.*obs_mask="):
        ImportanceWeightedELBO(K).loss(model, AutoNormal(model))

    def by_hand():
        pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N), poutine.mask(mask=~MASK):
            pyro.sample("x_unobserved", dist.Normal(torch.zeros(N), 1.0))

    ImportanceWeightedELBO(K).loss(model, by_hand)


def local_model(x, rows):
    with pyro.plate("data", 4 * len(x), subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_model(x, rows):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4 * len(x), subsample=rows) as found:
        assert found is rows
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@PARTICLES
def test_an_automatic_guide_with_rows_of_its_own(K):
    rows = torch.tensor([3, 1, 2, 0])
    with pytest.raises(ValueError, match=r"'data' has other rows in the guide.*create_plates"):
        ImportanceWeightedELBO(K).loss(local_model, AutoNormal(local_model), X[:4], rows)

    def plates(x, rows):
        return pyro.plate("data", 4 * len(x), subsample=rows)

    guide = AutoNormal(local_model, create_plates=plates)
    ImportanceWeightedELBO(K).loss(local_model, guide, X[:4], rows)


def test_rows_of_a_guide_without_local_sites_do_not_replace_those_of_the_model():
    rows = torch.tensor([3, 1, 2, 0])
    guide = AutoNormal(global_model)
    guide(X[:4], rows)
    for _ in range(3):
        ImportanceWeightedELBO(1).loss_and_grads(global_model, guide, X[:4], rows)


def test_a_flat_prior_by_a_mask_of_a_single_tensor():
    ImportanceWeightedELBO(3).loss(masked_model(torch.tensor(False)), NormalNormal(X).guide)


def test_rows_with_nan_are_the_same_rows():
    x = X[:4].clone()
    x[1] = torch.nan

    def program(rows, obs=None):
        with pyro.plate("data", 16, subsample=rows.clone()):
            pyro.sample("z", dist.Normal(0.0, 1.0), obs=obs)

    ImportanceWeightedELBO(3).loss(program, program, x)
