"""The benchmark of the estimators of the evidence: its counts, columns and other libraries."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from benchmarks import evidence_estimators as benchmark
from benchmarks.evidence_peers.densities import Densities
from benchmarks.evidence_run import Run
from tests.posteriors import POSTERIORS, Posterior


def test_evaluations_of_annealing():
    """A transition evaluates its start and each leapfrog step; the first pass has 20 more."""
    posterior = POSTERIORS["funnel"]()
    with benchmark.counted_evaluations() as counted:
        benchmark.annealed_importance_sampling(
            posterior.model,
            posterior.guide("wide"),
            *posterior.args,
            num_chains=5,
            num_temperatures=4,
            num_leapfrog_steps=3,
            max_plate_nesting=0,
        )
    transitions = 3 + (3 + 20)
    starts = 2  # of the chains of both passes
    assert sum(counted) == 5 * (transitions * (1 + 3) + starts)


def test_columns():
    runs = [Run(1.0, 100, 0.5), Run(-1.0, 300, 1.0), Run(3.0, 200, 0.1, ("ess",))]
    posterior = Posterior(lambda: None, (), 0.0)
    columns = dict(
        zip(
            benchmark.COLUMNS,
            benchmark.row("name", lambda _, seed: runs[seed], posterior, 3),
            strict=True,
        )
    )
    assert columns["mean estimate"] == "1.0000"
    assert columns["root mean square error"] == pytest.approx(math.sqrt(11 / 3))
    assert columns["mean square of error / reported error, without flag"] == pytest.approx(2.5)
    assert columns["runs with a flag"] == "1 of 3 (ess)"
    assert columns["error x sqrt(evaluations)"] == pytest.approx(math.sqrt(11 / 3 * 200))


def sites_at(posterior, z):
    """Return the values of the latent sites at unconstrained coordinates, and the log Jacobian."""
    values, log_jacobian, z = {}, 0.0, torch.tensor(z)
    for name, site in poutine.trace(posterior.model).get_trace(*posterior.args).nodes.items():
        if site["type"] == "sample" and not (site["is_observed"] or site_is_subsample(site)):
            shape = site["value"].shape
            own, z = z[: shape.numel()].reshape(shape), z[shape.numel() :]
            values[name] = own.exp() if name == "tau" else own
            log_jacobian += own.item() if name == "tau" else 0.0
    assert len(z) == 0
    return values, log_jacobian


@pytest.mark.parametrize("name", POSTERIORS)
def test_other_libraries_have_the_same_density(name):
    if name == "logistic_regression":
        pytest.importorskip("sklearn")
    posterior = POSTERIORS[name]()
    density = Densities(np).of(posterior)
    random = np.random.default_rng(0)
    for _ in range(3):
        z = density.from_uniform(random.random(density.num_dims))
        values, log_jacobian = sites_at(posterior, z)
        conditioned = poutine.condition(posterior.model, values)
        joint = poutine.trace(conditioned).get_trace(*posterior.args).log_prob_sum().item()
        assert density.log_start(z) + density.log_ratio(z) == pytest.approx(joint + log_jacobian)


@pytest.mark.parametrize("name", ["funnel", "two_modes_2", "eight_schools_centered"])
@pytest.mark.filterwarnings("ignore")  # of PyTensor
def test_pymc_and_jax_have_the_same_density(name):
    pytest.importorskip("pymc")
    jax = pytest.importorskip("jax")
    posterior = POSTERIORS[name]()
    density = Densities(np).of(posterior)
    z = density.from_uniform(np.random.default_rng(0).random(density.num_dims))
    expected = density.log_start(z) + density.log_ratio(z)
    model = import_module("benchmarks.evidence_peers.pymc_smc").model_of(posterior)
    point, rest = {}, z
    for variable, value in model.initial_point().items():
        size = np.size(value)
        point[variable], rest = rest[:size].reshape(np.shape(value)), rest[size:]
    assert model.compile_logp()(point) == pytest.approx(expected, rel=1e-6)
    in_jax = Densities(jax.numpy).of(posterior)
    assert in_jax.log_start(z) + in_jax.log_ratio(z) == pytest.approx(expected, rel=1e-5)
