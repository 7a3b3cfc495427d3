"""KLWeightedELBO against the closed form, with every objective that it takes."""

import copy
import pickle
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.distributions import kl_divergence

from pyro_ext.infer import (
    GeometricKL,
    ImportanceWeightedELBO,
    JackknifeELBO,
    KLSchedule,
    KLWeightedELBO,
    LinearKL,
    UniformKL,
)
from tests.statistics import assert_mean

LINEAR = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "ImportanceWeightedELBO": lambda: ImportanceWeightedELBO(1),
    "ImportanceWeightedELBO, dreg": lambda: ImportanceWeightedELBO(1, gradient="dreg"),
    "JackknifeELBO": lambda: JackknifeELBO(1, order=0),
}


class ConstantKL(KLSchedule):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def factor_at(self, step):
        return self.value

    @property
    def finished(self):
        return False


class Pair:
    """A global w, a local z in the data plate, both normal; the draws are given."""

    def __init__(self, num_data=12, dtype=torch.float64):
        self.x = torch.linspace(-2.0, 3.0, num_data, dtype=dtype)
        self.w_loc = pyro.param("w_loc", torch.tensor(0.7, dtype=dtype))
        self.w_scale = pyro.param("w_scale", torch.tensor(0.6, dtype=dtype))

    def model(self, x):
        w = pyro.sample("w", dist.Normal(x.new_tensor(0.5), 2.0))
        with pyro.plate("data", len(self.x), subsample=x):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(self, x):
        pyro.sample("w", dist.Normal(pyro.param("w_loc"), pyro.param("w_scale")))
        with pyro.plate("data", len(self.x), subsample=x):
            pyro.sample("z", dist.Normal(x / 2, 0.4))

    def terms(self, elbo, x):
        """The loss by hand on the draws that an objective makes: its parts for w, z and x."""
        trace = poutine.trace(self.guide).get_trace(x)
        w, z = trace.nodes["w"]["value"], trace.nodes["z"]["value"]
        prior, q = dist.Normal(x.new_tensor(0.5), 2.0), dist.Normal(self.w_loc, self.w_scale)
        local_prior, local_q = dist.Normal(w, 1.0), dist.Normal(x / 2, x.new_tensor(0.4))
        scale = len(self.x) / len(x)
        if isinstance(elbo, TraceMeanField_ELBO):
            kl = kl_divergence(q, prior), kl_divergence(local_q, local_prior)
        else:
            kl = (
                q.log_prob(w) - prior.log_prob(w),
                local_q.log_prob(z) - local_prior.log_prob(z),
            )
        return kl[0], scale * kl[1].sum(), -scale * dist.Normal(z, 0.5).log_prob(x).sum()


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


@pytest.mark.parametrize("num_batches", [1, 3, 8, 2000])
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


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_auxiliary_sites_of_autoguides_follow(guide, factor):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, b), obs=torch.tensor(1.5))

    guide = guide(model)
    guide()
    pyro.set_rng_seed(1)
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    nll = -model_trace.nodes["x"]["fn"].log_prob(torch.tensor(1.5))
    kl = guide_trace.log_prob_sum() - model_trace.log_prob_sum() - nll
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(factor))
    pyro.set_rng_seed(1)
    assert elbo.loss(model, guide) == pytest.approx((factor * kl + nll).item(), rel=1e-5)


def test_a_joint_guide_of_weighted_and_other_sites_is_refused():
    x = torch.randn(5)

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    joint, apart = AutoMultivariateNormal(model), AutoNormal(model)
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5))
    with pytest.raises(ValueError, match=r"_latent' may draw sites .* \['z'\].*draws them apart"):
        elbo.loss(model, joint)
    elbo.loss(model, apart)
    KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5), sites="all").loss(model, joint)

    parts = AutoGuideList(model)
    parts.append(AutoMultivariateNormal(poutine.block(model, expose=["w"])))
    parts.append(AutoNormal(poutine.block(model, expose=["z"])))
    elbo.loss(model, parts)
    pyro.set_rng_seed(1)
    trace = poutine.trace(parts).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    kl_w = sum(
        site["fn"].log_prob(site["value"]).sum()
        for name, site in trace.nodes.items()
        if name == "w" or name.endswith("_latent")
    )
    kl_w = kl_w - dist.Normal(0.0, 1.0).log_prob(trace.nodes["w"]["value"])
    plain = trace.log_prob_sum() - replayed.log_prob_sum()
    pyro.set_rng_seed(1)
    assert elbo.loss(model, parts) == pytest.approx((plain - 0.5 * kl_w).item(), rel=1e-5)


def discrete_pair():
    """A Bernoulli global and data; the exact weighted loss is a sum over two values."""
    x = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    theta = pyro.param("theta", x.new_tensor(0.3))

    def model():
        z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.4)))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z), obs=x)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta")))

    def exact(factor):
        loss = 0.0
        for z in (x.new_tensor(0.0), x.new_tensor(1.0)):
            log_q = dist.Bernoulli(logits=theta).log_prob(z)
            log_p = dist.Bernoulli(x.new_tensor(0.4)).log_prob(z)
            log_likelihood = dist.Bernoulli(0.2 + 0.5 * z).log_prob(x).sum()
            loss = loss + log_q.exp() * (factor * (log_q - log_p) - log_likelihood)
        return loss

    return model, guide, exact, theta


@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceGraph_ELBO", "ImportanceWeightedELBO"])
def test_score_function_gradients_have_the_mean_of_the_weighted_loss(name):
    model, guide, exact, theta = discrete_pair()
    (expected,) = torch.autograd.grad(exact(0.3), theta)
    elbo = KLWeightedELBO(LINEAR[name](), ConstantKL(0.3))
    gradients = []
    for _ in range(400):
        theta.grad = None
        elbo.loss_and_grads(model, guide)
        gradients.append(theta.grad.clone())
    assert_mean(torch.stack(gradients), expected)


def test_enumerated_sites_of_the_guide_are_exact():
    model, guide, exact, theta = discrete_pair()
    elbo = KLWeightedELBO(TraceEnum_ELBO(max_plate_nesting=1), ConstantKL(0.3))
    loss = elbo.loss_and_grads(model, config_enumerate(guide, "parallel"))
    assert loss == pytest.approx(exact(0.3).item(), rel=1e-12)
    (expected,) = torch.autograd.grad(exact(0.3), theta)
    torch.testing.assert_close(theta.grad, expected, rtol=1e-10, atol=0)


def test_enumerated_local_sites_of_the_model_have_no_kl_and_stay():
    x = torch.randn(6)
    in_parallel = {"enumerate": "parallel"}

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer=in_parallel)
            pyro.sample("x", dist.Normal(w + k, 1.0), obs=x)

    def guide():
        pyro.sample("w", dist.Normal(0.1, 0.5))

    def loss(elbo):
        pyro.set_rng_seed(1)
        return elbo.loss(model, guide)

    plain = TraceEnum_ELBO(max_plate_nesting=1)
    for sites in ("global", "all"):
        weighted = [
            loss(KLWeightedELBO(plain, ConstantKL(factor), sites)) for factor in (0.0, 1.0, 2.0)
        ]
        assert weighted[1] == pytest.approx(loss(plain), rel=1e-6)
        assert weighted[1] - weighted[0] == pytest.approx(weighted[2] - weighted[1], rel=1e-4)
    pyro.set_rng_seed(1)
    w = dist.Normal(0.1, 0.5).sample()
    kl = dist.Normal(0.1, 0.5).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w)
    assert weighted[1] - weighted[0] == pytest.approx(kl.item(), rel=1e-4)


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


def plates_pair(plates_of_w, plates_of_x):
    """A site w and an observed site x in plates: a of size 2 at dim -1, b of size 3 at dim -2."""
    sizes = {"a": 2, "b": 3}

    def make_plates():
        return {"a": pyro.plate("a", sizes["a"], dim=-1), "b": pyro.plate("b", sizes["b"], dim=-2)}

    def model():
        plates = make_plates()
        with ExitStack() as stack:
            for name in plates_of_w:
                stack.enter_context(plates[name])
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with ExitStack() as stack:
            for name in plates_of_x:
                stack.enter_context(plates[name])
            x = torch.zeros([sizes[name] for name in reversed(plates_of_x)])
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide():
        plates = make_plates()
        with ExitStack() as stack:
            for name in plates_of_w:
                stack.enter_context(plates[name])
            pyro.sample("w", dist.Normal(0.3, 0.5))

    return model, guide


@pytest.mark.parametrize(
    ("plates_of_w", "plates_of_x", "is_global"),
    [
        ("", "a", True),
        ("a", "a", False),
        ("b", "ab", True),
        ("ab", "a", False),
        ("b", "a", True),
    ],
)
def test_global_sites_are_those_that_data_points_share(plates_of_w, plates_of_x, is_global):
    model, guide = plates_pair(plates_of_w, plates_of_x)
    elbo = KLWeightedELBO(Trace_ELBO(), ConstantKL(0.5))
    if is_global:
        elbo.loss(model, guide)
    else:
        with pytest.raises(ValueError, match=r"sites='global' to match latent sites.*\['w'\]"):
            elbo.loss(model, guide)


def test_without_plates_every_site_is_global():
    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=torch.zeros(3))

    def guide():
        pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))

    kl = kl_divergence(dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0)) * 3
    losses = []
    for factor in (0.0, 1.0):
        pyro.set_rng_seed(1)
        elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(factor))
        losses.append(elbo.loss(model, guide))
    assert losses[1] - losses[0] == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("sites", ["all", lambda name: name != "z1"])
def test_sites_that_come_later_are_weighted_too(sites):
    def model(num_sites):
        for i in range(num_sites):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    def guide(num_sites):
        for i in range(num_sites):
            pyro.sample(f"z{i}", dist.Normal(3.0, 1.0))

    elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(0.0), sites)
    nll = 0.9189385
    assert elbo.loss(model, guide, 1) == pytest.approx(nll)
    assert elbo.loss(model, guide, 3) == pytest.approx(nll + (0.0 if sites == "all" else 4.5))


def test_a_factor_on_weights_does_not_make_them_local():
    def model():
        with pyro.plate("weights", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.factor("penalty", -w.abs())
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=torch.zeros(2))

    def guide():
        with pyro.plate("weights", 3):
            pyro.sample("w", dist.Normal(3.0, 0.5))

    losses = []
    for factor in (0.0, 1.0):
        pyro.set_rng_seed(1)
        elbo = KLWeightedELBO(TraceMeanField_ELBO(), ConstantKL(factor))
        losses.append(elbo.loss(model, guide))
    kl = 3 * kl_divergence(dist.Normal(3.0, 0.5), dist.Normal(0.0, 1.0))
    assert losses[1] - losses[0] == pytest.approx(kl.item(), rel=1e-5)


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
        (lambda: ImportanceWeightedELBO(5), "num_particles=1, got 5: with more its bound is not"),
        (lambda: RenyiELBO(num_particles=2), "linear in log p - log q .*got RenyiELBO"),
        (TraceTailAdaptive_ELBO, "got TraceTailAdaptive_ELBO"),
        (JitTrace_ELBO, "traced at each step .*got JitTrace_ELBO"),
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
    with pytest.raises(ValueError, match="num_particles=1, got 3"):
        elbo.loss(pair.model, pair.guide, pair.x)


def test_errors():
    pair = Pair()
    schedule = UniformKL()
    KLWeightedELBO(Trace_ELBO(), schedule)
    with pytest.raises(ValueError, match="one that belongs to another KLWeightedELBO"):
        KLWeightedELBO(Trace_ELBO(), schedule)
    with pytest.raises(TypeError, match="elbo must be an ELBO, but it is 'Trace_ELBO'"):
        KLWeightedELBO("Trace_ELBO", UniformKL())
    with pytest.raises(TypeError, match=r"schedule must be a KLSchedule, but it is 0\.5"):
        KLWeightedELBO(Trace_ELBO(), 0.5)
    with pytest.raises(ValueError, match=r"'global', 'all', a collection .* got 'local'"):
        KLWeightedELBO(Trace_ELBO(), UniformKL(), sites="local")
    nothing = KLWeightedELBO(Trace_ELBO(), UniformKL(), sites=lambda name: name == "v")
    with pytest.raises(ValueError, match=r"has \['w', 'z'\], and it matches none"):
        nothing.loss(pair.model, pair.guide, pair.x)
    unknown = KLWeightedELBO(Trace_ELBO(), UniformKL(), sites=["w", "v"])
    with pytest.raises(ValueError, match=r"got \['v'\] among them"):
        unknown.loss(pair.model, pair.guide, pair.x)
