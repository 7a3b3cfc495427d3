"""A scale that is the same at every site leaves every result as it is without the scale."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import annealed_importance_sampling, estimate_evidence, estimate_expectation

X = torch.tensor([0.3, -1.0, 2.0, 0.4])


def global_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)
    return z


def global_guide():
    pyro.sample("z", dist.Normal(0.3, 0.6))


def local_model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        y = pyro.sample("y", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(y, 1.0), obs=X)
    return z


def local_guide():
    z = pyro.sample("z", dist.Normal(0.2, 0.7))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal((X + z) / 2, 0.8))


def common_model():
    pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)
    return z.sum(-1)


def common_guide():
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(X / 2, 0.8))


PROGRAMS = {
    "global": (global_model, global_guide),
    "global and local": (local_model, local_guide),
    "local": (common_model, common_guide),
}


def evidence(model, guide):
    found = estimate_evidence(model, guide, num_samples=40)
    return [found.total, *found.log_evidence.reshape(-1).tolist()]


def expectation(model, guide):
    return [estimate_expectation(model, guide, num_samples=40).value.item()]


def annealing(model, guide):
    found = annealed_importance_sampling(
        model, guide, num_chains=3, num_temperatures=3, num_leapfrog_steps=2, progress_bar=False
    )
    return [found.total]


def resampled(model, guide):
    data = from_pyro_svi(model, guide, num_samples=40, resample="psis")
    statistics = group(data, "sample_stats")
    return (
        [*statistics["log_weight"].values.flat]
        if "log_weight" in statistics
        else [*statistics["log_weight_local"].values.flat]
    )


def diagnosis(model, guide):
    found = diagnose(model, guide, num_samples=40)
    return [found.pareto_k, found.ess, found.elbo, found.log_evidence, found.jackknife]


def left_out(model, guide):
    found = loo(model, guide, num_samples=40, num_local_samples=5)
    return [float(found["elpd_loo" if "elpd_loo" in found else "elpd"]), *found["pareto_k"].values]


@pytest.mark.filterwarnings("ignore:.*Pareto k", "ignore:Plate 'data' holds all the data")
@pytest.mark.parametrize("scale", [0.02, 30.0, torch.tensor(0.1)], ids=str)
@pytest.mark.parametrize(
    "result", [evidence, expectation, annealing, resampled, diagnosis, left_out]
)
@pytest.mark.parametrize(("model", "guide"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_uniform_scale_changes_nothing(model, guide, result, scale):
    if result is left_out and model is common_model:
        pytest.skip("there is no global latent site to leave a data point out of")
    found = []
    for handler in (lambda program: program, poutine.scale(scale=scale)):
        pyro.set_rng_seed(0)
        found.append(result(handler(model), handler(guide)))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-4, atol=2e-4)
