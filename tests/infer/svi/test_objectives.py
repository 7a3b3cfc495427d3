"""CompiledSVI takes the steps of SVI with the objectives of Pyro, or names those it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    SVI,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)

from pyro_ext.infer import CompiledSVI, KLWeightedELBO, LinearKL

X = torch.tensor([0.1, 2.0, 1.5])
VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}


def model(x=None):
    loc = pyro.param("prior", torch.tensor(0.0))
    z = pyro.sample("z", dist.Normal(loc, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def posterior():
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    return dist.Normal(pyro.param("loc", torch.tensor(0.3)), scale)


def guide(x=None):
    pyro.sample("z", posterior())


def guide_with_score(x):
    infer = {"baseline": {"use_decaying_avg_baseline": True}}
    pyro.sample("z", posterior().has_rsample_(False), infer=infer)


def guide_of_several(x):
    pyro.sample("z", posterior(), infer={"enumerate": "parallel", "num_samples": 4})


def annealed_mixture(x, factor):
    probs = pyro.param("probs", torch.ones(2) / 2, constraint=dist.constraints.simplex)
    with pyro.poutine.scale(None, factor), pyro.plate("data", 3):
        z = pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


#: name -> (a function that makes the objective, the guide)
CAPTURED = {
    "TraceEnum_ELBO": (lambda: TraceEnum_ELBO(max_plate_nesting=1), guide_of_several),
    "TraceTMC_ELBO": (lambda: TraceTMC_ELBO(max_plate_nesting=1), guide_of_several),
    "TraceGraph_ELBO": (lambda: TraceGraph_ELBO(), guide),
    "TraceGraph_ELBO, baseline": (lambda: TraceGraph_ELBO(), guide_with_score),
    "TraceGraph_ELBO, two particles": (lambda: TraceGraph_ELBO(num_particles=2), guide_with_score),
    "TraceGraph_ELBO, vectorised": (lambda: TraceGraph_ELBO(**VECTORIZED), guide_with_score),
    "RenyiELBO": (lambda: RenyiELBO(0.3, **VECTORIZED), guide),
    "RenyiELBO, looped": (lambda: RenyiELBO(0.3, num_particles=3), guide),
    "Trace_MMD": (lambda: Trace_MMD(RBF(1, torch.tensor(1.0)), **VECTORIZED), guide),
    "EnergyDistance": (lambda: EnergyDistance(num_particles=4), guide),
    "function": (lambda: lambda *args: 2.0 * Trace_ELBO().differentiable_loss(*args), guide),
    "KL weights of TraceGraph_ELBO": (
        lambda: KLWeightedELBO(TraceGraph_ELBO(), LinearKL(8)),
        guide_with_score,
    ),
}
#: (objective, a part of the reason)
REFUSED = [
    (lambda: JitTrace_ELBO(), "JitTrace_ELBO is compiled by torch.jit"),
    (lambda: JitTraceMeanField_ELBO(), "JitTraceMeanField_ELBO is compiled by torch.jit"),
    (lambda: JitTraceGraph_ELBO(), "JitTraceGraph_ELBO is compiled by torch.jit"),
    (
        lambda: JitTraceEnum_ELBO(strict_enumeration_warning=False, max_plate_nesting=1),
        "JitTraceEnum_ELBO is compiled by torch.jit",
    ),
    (lambda: ReweightedWakeSleep(num_particles=3), "ReweightedWakeSleep has two losses"),
    (lambda: TraceTailAdaptive_ELBO(**VECTORIZED), "TraceTailAdaptive_ELBO has .* no loss"),
]


def train(cls, make, guide, **options):
    """Losses and parameters after some steps from a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = make()
    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, **options)
    losses = []
    for _ in range(12):
        losses.append(svi.step(X))
        if isinstance(loss, KLWeightedELBO):
            loss.schedule.step()
    losses.append(svi.evaluate_loss(X))
    params = pyro.get_param_store().named_parameters()
    return losses, {name: param.detach().clone() for name, param in params}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using different numbers")
@pytest.mark.parametrize("name", CAPTURED)
def test_objectives_take_the_steps_of_svi(name):
    expected, expected_params = train(SVI, *CAPTURED[name])
    losses, params = train(CompiledSVI, *CAPTURED[name], backend="eager", fallback=False)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert params.keys() == expected_params.keys()
    for key, param in params.items():  # among them the average of the baseline
        torch.testing.assert_close(param, expected_params[key], rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_objectives_without_graphs_are_named(make, reason):
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), make(), backend="eager")
    with pytest.warns(UserWarning, match=reason):
        svi.step(X)


def test_the_scale_of_enumerated_sites_is_an_input():
    losses = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        svi = cls(
            annealed_mixture, lambda *args: None, pyro.optim.Adam({"lr": 0.1}), elbo, **options
        )
        losses.append([svi.step(X, 0.1 * (i + 1)) for i in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert svi._graphs.count == 1
