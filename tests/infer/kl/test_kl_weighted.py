"""KLWeightedELBO has the weighted loss in closed form, with every objective that it takes."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch.distributions import kl_divergence

from pyro_ext.infer import GeometricKL, ImportanceWeightedELBO, KLWeightedELBO, LinearKL, UniformKL
from tests.infer.kl.objectives import LINEAR, ConstantKL, Pair


@pytest.mark.long
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("sites", ["global", "all", ("z",), lambda name: name == "w"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_factor_multiplies_the_terms_of_the_sites_alone(name, sites, factor):
    pair = Pair()
    elbo = LINEAR[name]()
    weighted = KLWeightedELBO(elbo, ConstantKL(factor), sites=sites)
    x = pair.x[2:6]
    weighted.loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(1)
    loss = weighted.loss(pair.model, pair.guide, x)
    pyro.set_rng_seed(1)
    kl_w, kl_z, nll = pair.terms(elbo, x)
    by_w = 1.0 if sites == ("z",) else factor
    by_z = factor if sites in ("all", ("z",)) else 1.0
    assert loss == pytest.approx((by_w * kl_w + by_z * kl_z + nll).item(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LINEAR if "dreg" not in name])
def test_gradients_are_those_of_the_weighted_loss(name):
    pair = Pair()
    elbo = LINEAR[name]()
    weighted = KLWeightedELBO(elbo, ConstantKL(0.3))
    parameters = pair.w_loc, pair.w_scale
    weighted.loss(pair.model, pair.guide, pair.x)
    pyro.set_rng_seed(1)
    kl_w, kl_z, nll = pair.terms(elbo, pair.x)
    expected = torch.autograd.grad(0.3 * kl_w + kl_z + nll, parameters)
    pyro.set_rng_seed(1)
    weighted.loss_and_grads(pair.model, pair.guide, pair.x)
    torch.testing.assert_close([p.grad for p in parameters], list(expected), rtol=1e-10, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("num_batches", [1, 3, 8, 300])
@pytest.mark.parametrize("name", ["TraceMeanField_ELBO", "Trace_ELBO", "ImportanceWeightedELBO"])
def test_geometric_losses_of_an_epoch_average_to_the_plain_elbo(name, num_batches):
    x = torch.randn(num_batches, 2, dtype=torch.float64)

    def model(x_batch):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", x.numel(), subsample=x_batch):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_batch)

    def guide(x_batch):
        pyro.sample("z", dist.Normal(x.new_tensor(0.2), 0.7))

    def loss(elbo, x_batch):
        pyro.set_rng_seed(3)
        return elbo.loss(model, guide, x_batch)

    schedule = GeometricKL(num_batches)
    elbo = KLWeightedELBO(LINEAR[name](), schedule)
    losses = []
    for x_batch in x:
        losses.append(loss(elbo, x_batch))
        schedule.step()
    mean = sum(losses) / num_batches
    assert mean == pytest.approx(loss(elbo.elbo, x.flatten()), rel=1e-12)


def test_evaluation_does_not_advance_and_each_step_follows_the_schedule():
    pair = Pair()
    schedule = LinearKL(num_steps=4)
    elbo = KLWeightedELBO(TraceMeanField_ELBO(), schedule)
    svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    for factor in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        for evaluate in (svi.evaluate_loss, svi.step):
            pyro.set_rng_seed(1)
            loss = evaluate(pair.x)
            pyro.set_rng_seed(1)
            kl_w, kl_z, nll = pair.terms(elbo.elbo, pair.x)
            assert loss == pytest.approx((factor * kl_w + kl_z + nll).item(), rel=1e-12)
        schedule.step()


def test_the_first_call_draws_the_numbers_that_the_plain_objective_draws():
    pair = Pair()
    plain = Trace_ELBO().loss(pair.model, pair.guide, pair.x)
    pyro.set_rng_seed(0)
    weighted = KLWeightedELBO(Trace_ELBO(), UniformKL())
    assert weighted.loss(pair.model, pair.guide, pair.x) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_vectorised_particles(elbo):
    pair = Pair()
    plain = elbo(num_particles=8, vectorize_particles=True, max_plate_nesting=1)

    def loss(objective):
        pyro.set_rng_seed(1)
        return objective.loss(pair.model, pair.guide, pair.x)

    at = {f: loss(KLWeightedELBO(copy.copy(plain), ConstantKL(f))) for f in (0.0, 1.0, 3.0)}
    assert at[1.0] == pytest.approx(loss(plain), rel=1e-12)
    assert at[3.0] - at[0.0] == pytest.approx(3 * (at[1.0] - at[0.0]), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_the_loss_is_that_of_the_model(dtype):
    pair = Pair(dtype=dtype)
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(0.3))
    assert elbo.differentiable_loss(pair.model, pair.guide, pair.x).dtype == dtype


def test_module_interface_and_copies():
    class Model(torch.nn.Module):
        def forward(self, x):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            pyro.sample("w", dist.Normal(self.loc, 0.5))

    schedule = LinearKL(10)
    elbo = KLWeightedELBO(TraceMeanField_ELBO(), schedule)
    x = torch.full((4,), 2.0)
    module = elbo(Model(), Guide())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        module(x).backward()
        optimizer.step()
        schedule.step()
    assert abs(module.guide.loc.item() - 8 / 5) < 0.3
    for twin in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        assert twin.schedule.num_steps_taken == 100
        twin.schedule.step()
        twin.loss(Model(), Guide(), x)
        with pytest.raises(ValueError, match="belongs to another"):
            KLWeightedELBO(Trace_ELBO(), twin.schedule)
    assert schedule.num_steps_taken == 100
    KLWeightedELBO(Trace_ELBO(), copy.deepcopy(schedule))  # a copy is another schedule


def test_one_objective_serves_one_pair_after_another():
    elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(0.5))
    for factor_of_scale in (1.0, 2.0, 1.0):

        def model(scale=factor_of_scale):
            w = pyro.sample("w", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(w, 1.0), obs=torch.tensor(0.0))

        def guide():
            pyro.sample("w", dist.Normal(0.0, 1.0))

        pyro.set_rng_seed(1)
        w = dist.Normal(0.0, 1.0).sample()
        kl = kl_divergence(dist.Normal(0.0, 1.0), dist.Normal(0.0, factor_of_scale))
        expected = 0.5 * kl - dist.Normal(w, 1.0).log_prob(torch.tensor(0.0))
        pyro.set_rng_seed(1)
        assert elbo.loss(model, guide) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("elbo", "message"),
    [
        (
            lambda: ImportanceWeightedELBO(5),
            r"num_particles=1, but it has 5\. With more particles, its bound is not",
        ),
        (
            lambda: RenyiELBO(num_particles=2),
            "RenyiELBO is not an objective that is linear in log p - log q",
        ),
        (TraceTailAdaptive_ELBO, "TraceTailAdaptive_ELBO is not an objective"),
        (JitTrace_ELBO, "JitTrace_ELBO is not .* traced at each step"),
    ],
)
def test_objectives_that_are_refused(elbo, message):
    schedule = UniformKL()
    with pytest.raises(ValueError, match=message):
        KLWeightedELBO(elbo(), schedule)
    KLWeightedELBO(Trace_ELBO(), schedule)  # it belongs to none yet


def test_more_particles_later_are_refused():
    pair = Pair()
    elbo = KLWeightedELBO(ImportanceWeightedELBO(1), UniformKL())
    elbo.elbo.num_particles = 3
    with pytest.raises(ValueError, match="num_particles=1, but it has 3"):
        elbo.loss(pair.model, pair.guide, pair.x)


def test_errors():
    pair = Pair()
    schedule = UniformKL()
    KLWeightedELBO(Trace_ELBO(), schedule)
    with pytest.raises(ValueError, match="the schedule belongs to another KLWeightedELBO"):
        KLWeightedELBO(Trace_ELBO(), schedule)
    with pytest.raises(TypeError, match="elbo must be an ELBO, but it is 'Trace_ELBO'"):
        KLWeightedELBO("Trace_ELBO", UniformKL())
    with pytest.raises(
        TypeError, match=r"schedule must be an instance of KLSchedule, but it is 0\.5"
    ):
        KLWeightedELBO(Trace_ELBO(), 0.5)
    with pytest.raises(ValueError, match=r"'global', 'all', a collection .* but it is 'local'"):
        KLWeightedELBO(Trace_ELBO(), UniformKL(), sites="local")
    nothing = KLWeightedELBO(Trace_ELBO(), UniformKL(), sites=lambda name: name == "v")
    with pytest.raises(ValueError, match=r"a function, matches none .* \['w', 'z'\]"):
        nothing.loss(pair.model, pair.guide, pair.x)
    unknown = KLWeightedELBO(Trace_ELBO(), UniformKL(), sites=["w", "v"])
    with pytest.raises(ValueError, match=r"sites contains \['v'\], but"):
        unknown.loss(pair.model, pair.guide, pair.x)
