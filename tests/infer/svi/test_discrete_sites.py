"""CompiledSVI takes the steps of SVI for models with marked discrete sites."""

import pyro
import pytest
import torch
from pyro.infer import SVI

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from tests.discrete_models import MODELS, PRIOR, X
from tests.registry import VECTORIZE

pytestmark = pytest.mark.usefixtures("float64")


def guide(*_):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=pyro.distributions.constraints.positive)
    pyro.sample("means", type(PRIOR)(loc, scale).to_event(1))


def train(cls, model, vectorize, gradient, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = ImportanceWeightedELBO(5, gradient=gradient, vectorize_particles=vectorize)
    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo, **options)
    losses = [svi.step(X + 0.1 * i) for i in range(8)]
    params = pyro.get_param_store().named_parameters()
    return losses, {name: param.detach().clone() for name, param in params}


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
@VECTORIZE
@pytest.mark.parametrize("gradient", [pytest.param("pathwise", marks=pytest.mark.slow), "dreg"])
@pytest.mark.parametrize("name", MODELS)
def test_graph_steps_equal_eager_steps(name, gradient, vectorize):
    expected, expected_params = train(SVI, MODELS[name], vectorize, gradient)
    options = {"backend": "eager", "fallback": False}
    found, params = train(CompiledSVI, MODELS[name], vectorize, gradient, **options)
    assert found == pytest.approx(expected, rel=1e-12)
    for key, param in expected_params.items():
        torch.testing.assert_close(params[key], param, rtol=1e-10, atol=1e-12)
