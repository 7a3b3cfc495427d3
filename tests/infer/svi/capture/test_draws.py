"""Which distributions can be drawn in a compiled step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ext.infer import CompiledSVI

#: name -> (a function of a parameter that makes the distribution, its value)
CAPTURED = {
    "Gamma": (lambda a: dist.Gamma(a, 1.0), 2.0),
    "InverseGamma": (lambda a: dist.InverseGamma(a, 1.0), 2.0),
    "Beta": (lambda a: dist.Beta(a, 1.0), 2.0),
    "Dirichlet": (dist.Dirichlet, [2.0, 1.0]),
    "Chi2": (dist.Chi2, 2.0),
    "StudentT": (lambda a: dist.StudentT(a, 0.0, 1.0), 2.0),
    "LKJCholesky": (lambda a: dist.LKJCholesky(3, a), 1.0),
    "Poisson": (dist.Poisson, 2.0),
    "Binomial": (lambda a: dist.Binomial(4, a / (1 + a)), 2.0),
    "GammaPoisson": (lambda a: dist.GammaPoisson(a, 1.0), 2.0),
    "Multinomial": (lambda a: dist.Multinomial(4, a), [0.3, 0.7]),
    "OneHotCategorical": (dist.OneHotCategorical, [0.3, 0.7]),
    "straight through": (dist.OneHotCategoricalStraightThrough, [0.3, 0.7]),
}
REFUSED = {
    "VonMises": (lambda a: dist.VonMises(0.2, a), 2.0),
    "Wishart": (lambda a: dist.Wishart(a, torch.eye(2)), 4.0),
    "Stable": (lambda a: dist.Stable(torch.tensor(1.5), torch.tensor(0.0), a), 2.0),
}


def losses_of(cls, make, value, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def draw():
        parameter = pyro.param("a", torch.tensor(value), constraint=dist.constraints.positive)
        return pyro.sample("z", make(parameter))

    def model():
        pyro.factor("f", -((draw().float() - 3) ** 2).sum())

    svi = cls(model, draw, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
    return [svi.step() for _ in range(6)]


@pytest.mark.long
@pytest.mark.parametrize("name", CAPTURED)
def test_draws_take_the_steps_of_svi(name):
    expected = losses_of(SVI, *CAPTURED[name])
    found = losses_of(CompiledSVI, *CAPTURED[name], backend="eager", fallback=False)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_read_values_take_eager_steps(name):
    with pytest.warns(UserWarning, match="takes eager steps"):
        losses_of(CompiledSVI, *REFUSED[name], backend="eager")
