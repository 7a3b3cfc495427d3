"""Functions that take programs take them one way."""

import logging
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ext._random_states import kept_random_states
from pyro_ext.diagnostics import (
    diagnose,
    from_pyro_svi,
    loo,
    simulation_based_calibration,
)
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import (
    ImportanceWeightedELBO,
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
    gradient_diagnostics,
    sequential_monte_carlo,
)

X = torch.linspace(-1.0, 2.0, 4)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Pareto k is above:UserWarning"),
]


def model(x, num_samples=1):
    loc = pyro.sample("loc", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, float(num_samples)), obs=x)
    return loc


def guide(x, num_samples=1):
    pyro.sample("loc", dist.Normal(pyro.param("q", torch.tensor(0.4)), 0.5))


def make_guide(model, data):
    return lambda x, num_samples=1: pyro.sample(
        "loc", dist.Normal(data["x"].mean(-1, keepdim=True), 0.5).mask(True)
    )


#: name -> (function with few draws, a number out of its result)
FUNCTIONS = {
    "estimate_evidence": (
        partial(estimate_evidence, num_samples=20, jackknife_orders=()),
        lambda found: found.total,
    ),
    "estimate_expectation": (
        partial(estimate_expectation, num_samples=20),
        lambda found: found.value.item(),
    ),
    "annealed_importance_sampling": (
        partial(
            annealed_importance_sampling,
            num_chains=3,
            num_temperatures=3,
            num_leapfrog_steps=1,
        ),
        lambda found: found.total,
    ),
    "sequential_monte_carlo": (
        partial(
            sequential_monte_carlo,
            num_particles=4,
            chain_length=2,
            num_runs=4,
            target_ess=0.1,
            check_prior=False,
        ),
        lambda found: found.evidence.total,
    ),
    "gradient_diagnostics": (
        partial(
            gradient_diagnostics,
            elbos={"elbo": ImportanceWeightedELBO(3, max_plate_nesting=1)},
            num_repeats=3,
        ),
        lambda found: found.guide["elbo"].std,
    ),
    "from_pyro_svi": (
        partial(from_pyro_svi, prior=False),
        lambda found: float(group(found, "sample_stats")["log_weight"].mean()),
    ),
    "diagnose": (diagnose, lambda found: found.elbo),
    "loo": (loo, lambda found: float(found.iloc[0])),
}
EACH = pytest.mark.parametrize(("function", "number"), FUNCTIONS.values(), ids=FUNCTIONS)


def run(function, number, *args, **kwargs):
    pyro.set_rng_seed(3)
    return number(function(*args, **kwargs))


def trained():
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-9}), Trace_ELBO())
    svi.step(X)
    return svi


@pytest.mark.long
@EACH
def test_an_svi_or_model_and_guide_then_the_arguments_of_both(function, number):
    svi = trained()
    expected = run(function, number, model, guide, X)
    assert run(function, number, svi, X) == expected
    assert run(function, number, model, guide, x=X) == expected
    assert run(function, number, model, guide, model_args=(X,)) == expected
    assert run(function, number, svi, model_args=[X]) == expected
    assert run(function, number, model=svi, model_kwargs={"x": X}) == expected
    assert run(function, number, model=model, guide=guide, model_args=(X,)) == expected


@pytest.mark.long
@EACH
def test_names_may_clash(function, number):
    expected = run(function, number, model, guide, X, 2)
    assert run(function, number, model, guide, X, model_kwargs={"num_samples": 2}) == expected


@EACH
def test_what_is_no_program(function, number):
    for wrong, words in (
        (
            torch.zeros(10_000),
            r"the guide is a tensor of shape \(10000,\)\. Pass the model, then the guide",
        ),
        ([0.0] * 10_000, r"the guide is a list of length 10000\. Pass a guide"),
        (dist.Normal, r"the guide is the class Normal\. Pass an instance"),
        (trained(), r"the guide is an SVI\. Pass its guide, svi\.guide"),
    ):
        with pytest.raises(TypeError, match=words) as raised:
            function(model, wrong, X)
        assert len(str(raised.value)) < 300
    with pytest.raises(TypeError, match=r"given twice\. Pass them after the guide"):
        function(model, guide, X, model_args=(X,))
    with pytest.raises(TypeError, match=r"\['x'\] were given twice"):
        function(model, guide, x=X, model_kwargs={"x": X})


def test_an_svi_that_was_never_stepped():
    new = SVI(lambda: None, lambda: None, pyro.optim.Adam({}), Trace_ELBO())
    for function, _ in FUNCTIONS.values():
        with pytest.raises(ValueError, match="the SVI has not been trained"):
            function(new)


def test_no_guide_is_the_prior_or_an_error():
    assert estimate_evidence(model, num_samples=10, model_args=(X,)).num_samples == 10
    assert estimate_evidence(model, None, X, num_samples=10).num_samples == 10
    for function in (diagnose, loo, from_pyro_svi):
        with pytest.raises(TypeError, match="the guide is missing"):
            function(model)


def test_calibration_takes_a_function_in_the_place_of_the_guide():
    options = {"num_steps": 0, "num_simulations": 10, "num_samples": 3, "vectorize": False}
    found = []
    for args, kwargs in (((X,), {}), ((), {"x": X}), ((), {"model_args": (X,)})):
        pyro.set_rng_seed(0)
        made = partial(lambda model, data: lambda x: guide(x))
        calibration = simulation_based_calibration(model, made, *args, **options, **kwargs)
        found.append(calibration.probabilities["loc"])
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    with pytest.raises(TypeError, match=r"the model is an SVI\. Pass its model, svi\.model"):
        simulation_based_calibration(trained(), make_guide, X)


@pytest.mark.long
def test_functions_print_no_guessed_plate_nesting(caplog):
    with caplog.at_level(logging.INFO):
        for function, _ in FUNCTIONS.values():
            function(model, guide, X)
        ImportanceWeightedELBO(3).loss(model, guide, X)
    assert caplog.records == []


@pytest.mark.parametrize("seed", [None, 5])
def test_random_states_are_kept_also_after_an_exception(seed):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(IndexError), kept_random_states(seed):
        [torch.rand(1), random.random(), np.random.rand()][3]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
