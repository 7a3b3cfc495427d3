"""Annealing with compiled graphs gives the results without them."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_ext.infer import annealed_importance_sampling
from pyro_ext.infer.annealing.compiled_slopes import chosen_slopes
from pyro_ext.infer.annealing.slopes import slopes_at
from pyro_ext.infer.annealing.unconstrained import UnconstrainedPrograms
from pyro_ext.tracing import Programs
from tests.infer.annealing.test_annealed_importance_sampling import gamma_poisson
from tests.models import GlobalNormal, NormalNormal

X = torch.tensor([0.3, -1.9, 2.4, -0.2], dtype=torch.float64)
SETTINGS = {"num_chains": 6, "num_temperatures": 3, "num_leapfrog_steps": 2, "compile": "eager"}
pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k", "ignore:Plate 'data' holds all")


def mixture(x=X):
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)


def random_program():
    z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
    pyro.sample("x", dist.Normal(z, random.choice([1.0])), obs=X[0])


def automatic():
    model = GlobalNormal(X).model
    guide = AutoMultivariateNormal(model)
    guide()  # makes its parameters
    return model, guide


PROGRAMS = {
    "gamma": lambda: (gamma_poisson, None),
    "enumerated": lambda: (mixture, None),
    "automatic guide": automatic,
}


def anneal(model, guide=None, *args, **settings):
    pyro.set_rng_seed(1)
    return annealed_importance_sampling(model, guide, *args, **{**SETTINGS, **settings})


@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_seeds_give_equal_results(name):
    pair = PROGRAMS[name]()
    expected = anneal(*pair, compile=False)
    found = anneal(*pair)  # a fallback would warn, which is an error
    torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.acceptance, expected.acceptance, rtol=1e-5, atol=1e-5)


def test_agrees_with_the_closed_form():
    programs = GlobalNormal(X, exact_guide=False)
    settings = {"num_chains": 100, "num_temperatures": 30, "num_leapfrog_steps": 5}
    found = anneal(programs.model, programs.guide, **settings)
    assert (found.log_evidence - programs.log_evidence()).abs() < 4.5 * found.std_error
    assert found.std_error < 0.1


@pytest.mark.slow
def test_the_compiler_gives_the_results_without_it():
    programs = NormalNormal(X)
    pair = programs.model, programs.guide
    expected, found = (anneal(*pair, compile=chosen) for chosen in (False, True))
    torch.testing.assert_close(found.log_evidence, expected.log_evidence, rtol=1e-5, atol=1e-5)


def test_temperatures_and_positions_are_inputs_of_one_graph():
    programs = NormalNormal(X)
    target = UnconstrainedPrograms("test", Programs(programs.model, programs.guide), 1)
    positions = target.draw(5)
    compiled = chosen_slopes("test", "eager")
    betas = [0.2, 0.7, 1.0, *torch.rand(3, dtype=torch.float64), *torch.rand(3, 4).double()]
    for beta in betas:
        positions = {name: u + 0.1 for name, u in positions.items()}
        expected, found = (f(target, positions, beta) for f in (slopes_at, compiled))
        torch.testing.assert_close(found, expected)
    # One graph for temperatures without dims, and one for those of the plate.
    assert len(compiled.capture_report().graphs) == 2
    assert compiled.capture_report().num_eager_steps == 0


def test_a_program_without_a_graph_runs_without_it():
    expected = anneal(random_program, compile=False)
    with pytest.warns(UserWarning, match="annealed_importance_sampling takes eager") as caught:
        found = anneal(random_program)
    assert len(caught) == 1
    torch.testing.assert_close(found.log_evidence, expected.log_evidence)


def test_compile_is_checked():
    with pytest.raises(ValueError, match="compile must be True, False or 'eager', but it is"):
        anneal(mixture, compile="fast")
