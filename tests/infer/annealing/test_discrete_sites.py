"""Annealed importance sampling of the marginal density of models with marked discrete sites."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import annealed_importance_sampling
from tests.discrete_models import MODELS, X, guide, log_evidence

pytestmark = [
    pytest.mark.filterwarnings("ignore:Plate 'data' holds"),
    pytest.mark.usefixtures("float64"),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", [guide, None], ids=["guide", "prior"])
def test_chains_move_on_the_marginal_density(name, start):
    found = annealed_importance_sampling(
        MODELS[name], start, X, num_chains=100, num_temperatures=10, num_leapfrog_steps=3
    )
    assert abs(found.log_evidence - log_evidence(name)) < 4.5 * found.std_error
    assert found.std_error < 0.1
    assert found.acceptance > 0.6


def test_a_prior_that_depends_on_summed_out_sites_is_refused():
    def model():
        a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(4 * a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"prior of site 'z' depends on site 'a'.* Pass a guide"):
        annealed_importance_sampling(model, None, num_temperatures=3)
