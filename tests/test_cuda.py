"""Everything follows the user's tensors to a CUDA device."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide

from pyro_ext.diagnostics import from_pyro_svi, loo
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.distributions import NormalScaleMixture
from pyro_ext.infer import (
    CompiledSVI,
    EagerSVI,
    EvidenceState,
    ImportanceWeightedELBO,
    KLWeightedELBO,
    LinearKL,
    annealed_importance_sampling,
    estimate_evidence,
    sequential_monte_carlo,
)
from pyro_ext.nn import BayesianModule, MeanFieldGuide, flipout, local_reparameterization
from pyro_ext.ops import jackknife, jackknife_derivatives, leave_one_out_log_mean_exp, pareto_k
from tests.models import Hierarchical, NormalNormal, TwoLayer
from tests.registry import DISTRIBUTIONS, ESTIMATORS

pytestmark = pytest.mark.cuda
EVERY_ESTIMATOR = pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)


@pytest.fixture
def x():
    return torch.linspace(-2, 2, 6, device="cuda", dtype=torch.float64)


@EVERY_ESTIMATOR
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_exact_posterior_and_a_step(make, smallest, vectorize, x):
    elbo = make(smallest + 2, vectorize_particles=vectorize)
    programs = NormalNormal(x, exact_guide=True)
    expected = -programs.log_evidence().sum().item()
    assert elbo.loss(programs.model, programs.guide) == pytest.approx(expected)
    minibatch = NormalNormal(x, subsample_size=2)
    assert math.isfinite(elbo.loss(minibatch.model, minibatch.guide))

    programs = TwoLayer(x)
    svi = SVI(programs.model, programs.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    assert math.isfinite(svi.step())
    assert all(p.is_cuda for p in pyro.get_param_store().values())
    assert elbo.trace_particles(programs.model, programs.guide).log_w.is_cuda


@EVERY_ESTIMATOR
def test_a_bound_and_its_derivatives_do_not_wait_for_the_device(make, smallest):
    elbo = make(smallest + 2)
    log_w = torch.randn(smallest + 2, 5, device="cuda", requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        elbo.bound(log_w).sum().backward()
        elbo.derivatives(log_w)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ops_equal_those_on_the_cpu(dtype):
    log_w = 5 * torch.randn(60, 4, dtype=dtype)
    log_w[:5, 1] = -math.inf
    functions = (
        lambda w: jackknife(w, 2),
        lambda w: torch.stack(jackknife_derivatives(w, 1)),
        leave_one_out_log_mean_exp,
        pareto_k,
    )
    for function in functions:
        torch.testing.assert_close(function(log_w.cuda()).cpu(), function(log_w))


@EVERY_ESTIMATOR
def test_local_plate(make, smallest, x):
    programs = Hierarchical(x, exact_guide=True)
    for rule in ("pathwise", "stl", "dreg"):
        elbo = make(smallest + 2, gradient=rule, local_plate="data")
        loss = elbo.loss_and_grads(programs.model, programs.guide)
        assert loss == pytest.approx(-programs.log_evidence().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_equal_those_on_the_cpu(name, dtype):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    found = []
    values = cls(**parameters((3,), dtype=dtype), **fixed).sample((1000,))
    for device in ("cpu", "cuda"):
        given = {k: p.requires_grad_() for k, p in parameters((3,), dtype=dtype).items()}
        on_device = {k: p.to(device) for k, p in given.items()}
        d = cls(**on_device, **fixed)
        assert d.sample((5,)).device.type == device
        log_prob = d.log_prob(values.to(device))
        gradients = torch.autograd.grad(log_prob.sum(), list(given.values()))
        found.append((log_prob.cpu(), *gradients))
    for one, other in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_evidence(x):
    programs = NormalNormal(x, exact_guide=True)
    state = EvidenceState()
    options = {"num_samples": 50, "chunk_size": 20, "jackknife_orders": (1, 2)}
    for blocks in ({"state": state}, {"data_plate": "data", "batch_size": 4}):
        found = estimate_evidence(programs.model, programs.guide, **options, **blocks)
        assert found.log_evidence.is_cuda
        torch.testing.assert_close(found.log_evidence, programs.log_evidence())
        assert found.to_dataset()["jackknife"].shape == (2, 6)
    options["num_samples"] = 100
    more = estimate_evidence(programs.model, programs.guide, state=state, **options)
    torch.testing.assert_close(more.log_evidence, programs.log_evidence())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_annealing(x, dtype):
    programs = NormalNormal(x.to(dtype))
    found = annealed_importance_sampling(
        programs.model,
        programs.guide,
        num_chains=50,
        num_temperatures=20,
        exact_sample={"z": programs.x / 2},
    )
    assert found.log_evidence.is_cuda
    assert found.upper.is_cuda
    error = found.log_evidence - programs.log_evidence()
    assert (error.abs() < 5 * found.std_error).all()
    assert "nats" in repr(found)


def test_sequential_monte_carlo(x):
    programs = NormalNormal(x)
    found = sequential_monte_carlo(
        programs.model, programs.guide, exact_sample={"z": programs.x / 2}, check_prior=False
    )
    assert found.draws["z"].is_cuda
    assert found.evidence.upper.is_cuda
    evidence = found.evidence
    error = evidence.log_evidence - programs.log_evidence()
    assert (error.abs() < 5 * evidence.std_error).all()


def test_autoguide(x):
    def model():
        loc = pyro.param("loc", x.new_tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(loc, x.new_tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = autoguide.AutoNormal(model)
    for make, smallest in ESTIMATORS.values():
        elbo = make(smallest + 2)
        assert math.isfinite(elbo.loss_and_grads(model, guide))
        elbo.check(model, guide)


def test_mixed_precision(x):
    net = torch.nn.Linear(1, 1, device="cuda")
    x = x.float()

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 1.0))

    for make, smallest in ESTIMATORS.values():
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cuda", dtype):
                found = make(smallest + 2).trace_particles(model, guide)
                assert math.isfinite(make(smallest + 2).loss_and_grads(model, guide))
            assert found.log_w.dtype == torch.float32


@pytest.mark.parametrize("handler", [nullcontext, flipout, local_reparameterization])
def test_a_bayesian_module_that_was_moved(handler):
    prior = NormalScaleMixture(torch.tensor([1.0, 0.01]), probs=torch.tensor([0.5, 0.5]))
    net = BayesianModule(torch.nn.Linear(3, 2), prior).cuda()
    guide = MeanFieldGuide(net)
    x, y = torch.randn(5, 3, device="cuda"), torch.zeros(5, device="cuda")

    def model(x, y):
        logits = net(x)
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    elbo = KLWeightedELBO(Trace_ELBO(), LinearKL(3))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    for _ in range(3):
        with handler():
            assert math.isfinite(svi.step(x, y))
        elbo.schedule.step()
    many = Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    assert many.differentiable_loss(model, guide, x, y).is_cuda


def test_export(x):
    programs = NormalNormal(x, exact_guide=True)
    found = from_pyro_svi(programs.model, programs.guide, num_samples=20, resample="psis")
    posterior = group(found, "posterior")["z"]
    assert posterior.shape == (1, 20, 6)
    weights = group(found, "sample_stats")["log_weight_local"].values
    expected = programs.log_evidence().cpu().expand(1, 20, 6)
    torch.testing.assert_close(torch.tensor(weights), expected)


def test_leave_one_out(x):
    programs = Hierarchical(x, exact_guide=True)
    found = loo(programs.model, programs.guide, num_samples=20, num_local_samples=5)
    assert found["n_data_points"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "eager"},
        {"backend": "inductor"},
        {"backend": "inductor", "mode": "reduce-overhead"},
    ],
    ids=["graph", "inductor", "CUDA graphs"],
)
@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_compiled_steps(options, gradient):
    x = torch.linspace(-2, 2, 6, device="cuda")
    losses = []
    for cls, chosen in ((SVI, {}), (CompiledSVI, {**options, "fallback": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        programs = TwoLayer(x)
        loss = ImportanceWeightedELBO(5, gradient=gradient, max_plate_nesting=1)
        svi = cls(programs.model, programs.guide, pyro.optim.Adam({"lr": 0.01}), loss, **chosen)
        losses.append([svi.step() for _ in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert all(p.is_cuda for p in pyro.get_param_store().values())


def test_a_run_resumes(x, tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        programs = TwoLayer(x)
        optim = pyro.optim.Adam({"lr": 0.01})
        return EagerSVI(programs.model, programs.guide, optim, ImportanceWeightedELBO(5))

    expected = fresh().run(6, 2, False).losses
    svi = fresh()
    svi.run(6, 1, False, checkpoint=tmp_path / "run")
    assert fresh().run(6, 2, False, resume=tmp_path / "run").losses == pytest.approx(expected)
