"""Estimates for models whose marked discrete sites are summed out."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence, estimate_expectation
from tests.discrete_models import (
    MODELS,
    PROBS,
    X,
    exact_discrete,
    guide,
    guide_of_rows,
    log_evidence,
    mixture,
    rows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Plate 'data' holds"),
    pytest.mark.usefixtures("float64"),
]
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


IN_CHUNKS = pytest.mark.parametrize(
    ("num", "chunk"),
    [
        pytest.param(4000, None, id="at once"),
        pytest.param(200, 1, id="in turn", marks=pytest.mark.slow),
    ],
)


@EVERY_MODEL
@pytest.mark.parametrize("proposal", [guide, None], ids=["guide", "prior"])
@IN_CHUNKS
def test_the_evidence_is_that_of_the_sums(name, proposal, num, chunk):
    found = estimate_evidence(MODELS[name], proposal, X, num_samples=num, chunk_size=chunk)
    assert abs(found.log_evidence - log_evidence(name)) < 4.5 * found.std_error
    assert found.std_error < 0.3


@pytest.mark.parametrize("data", ["all", "loader", "plate"])
def test_rows_in_a_common_plate_have_evidences_of_their_own(data):
    if data == "loader":
        # The plate takes the size of the batches that it gets.
        found = estimate_evidence(rows, guide_of_rows, data_loader=X.split(5), num_samples=4000)
    else:
        options = {} if data == "all" else {"data_plate": "data", "batch_size": 5}
        found = estimate_evidence(rows, guide_of_rows, X, num_samples=4000, **options)
    loc = 2.0 * torch.arange(2.0)
    exact = (dist.Normal(loc, 1.25**0.5).log_prob(X[:, None]) + PROBS.log()).logsumexp(-1)
    assert found.log_evidence.shape == X.shape
    assert ((found.log_evidence - exact).abs() < 4.5 * found.std_error).all()


@EVERY_MODEL
@IN_CHUNKS
def test_an_expectation_of_discrete_sites_is_one_over_their_draws(name, num, chunk):
    found = estimate_expectation(MODELS[name], guide, X, num_samples=num, chunk_size=chunk)
    assert abs(found.value - exact_discrete(name).sum()) < 4.5 * found.std_error
    assert found.std_error < 0.4


@pytest.mark.parametrize("estimate", [estimate_evidence, estimate_expectation])
def test_a_prior_that_depends_on_summed_out_sites_is_refused(estimate):
    def model():
        a = pyro.sample("a", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        return pyro.sample("z", dist.Normal(3.0 * a, 1.0))

    with pytest.raises(ValueError, match=r"prior of site 'z' depends on site 'a'.* Pass a guide"):
        estimate(model, None)


BAD = {
    "NaN": (torch.tensor([0.3, torch.nan]), "log-probability of site 'x' of the model is NaN"),
    "inf": (torch.tensor([0.3, torch.inf]), "log-probability of site 'x' of the model is infinite"),
}


@pytest.mark.parametrize(("x", "message"), BAD.values(), ids=BAD)
def test_an_error_names_the_site_in_the_sum(x, message):
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        ImportanceWeightedELBO(3).loss_and_grads(mixture, guide, x)


def test_an_error_names_the_sum_if_no_single_site_is_the_cause():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        impossible = torch.tensor([-torch.inf, 0.0])
        pyro.factor("one", torch.where(a == 1, impossible[0], impossible[1]) + 0 * z)
        pyro.factor("other", torch.where(a == 1, impossible[1], impossible[0]) + 0 * z)

    with pytest.raises(ValueError, match="site 'a' of the model is infinite"):
        ImportanceWeightedELBO(3).loss_and_grads(
            model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        )
