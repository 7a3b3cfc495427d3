"""Every rule that claims to be unbiased, against exact gradients or the pathwise one."""

import itertools
import math
import runpy
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, autoguide
from torch import nn

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultiplyImportanceWeightedELBO,
    MultiSampleELBO,
    PartiallyImportanceWeightedELBO,
    ThermodynamicELBO,
)
from pyro_ext.ops import jackknife, log_mean_exp
from tests.models import NormalNormal, TwoLayer
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean

F64 = {"dtype": torch.float64}
EVERY_ESTIMATOR = pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])


def gradient(elbo, model, guide, parameters, seed):
    """One estimate of the gradient of the bound in a list of tensors, as one vector."""
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return -torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def stored_parameters(elbo, model, guide):
    elbo.loss(model, guide)
    parameters = {}
    for program in (model, guide):
        if isinstance(program, nn.Module):
            parameters |= {id(p): p for p in program.parameters()}
    parameters |= {id(p): p for _, p in pyro.get_param_store().named_parameters()}
    return list(parameters.values())


def assert_same_mean(make, K, model, guide, rules=("pathwise", "dreg"), num_seeds=300, **options):
    """The same noise under both rules: the paired difference has mean zero."""
    elbos = [make(K, gradient=rule, **options) for rule in rules]
    parameters = stored_parameters(elbos[0], model, guide)
    draws = [
        torch.stack([gradient(elbo, model, guide, parameters, s) for s in range(num_seeds)])
        for elbo in elbos
    ]
    assert_mean(draws[1] - draws[0], 0.0)
    return draws


# Many replicates in one plate, each with parameters of its own, so that one step gives as many
# estimates of the gradient.
REPLICATES = 4000


def replicated(*values):
    return [torch.full((REPLICATES,), v, **F64).requires_grad_() for v in values]


@VECTORIZE
@EVERY_ESTIMATOR
def test_two_stochastic_layers_with_a_shared_parameter(make, smallest, vectorize):
    a, w, b, s = parameters = replicated(0.3, 0.8, 0.4, 0.9)
    x = torch.tensor(0.7, **F64)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z2 = pyro.sample("z2", dist.Normal(a, 1.0))
            z1 = pyro.sample("z1", dist.Normal(w * z2, 1.0))
            pyro.sample("x", dist.Normal(w * z1, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            z1 = pyro.sample("z1", dist.Normal(b * x, s))
            pyro.sample("z2", dist.Normal(w * z1 / 2, s))

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1}
    pathwise, dreg = (
        gradient(make(max(smallest, 3), gradient=rule, **options), model, guide, parameters, seed=0)
        for rule in ("pathwise", "dreg")
    )
    assert_mean((dreg - pathwise).view(4, -1).T, 0.0)


def test_looped_and_vectorized_rules_agree_for_one_particle():
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64))
    for rule in ("pathwise", "stl", "dreg"):
        elbos = [
            ImportanceWeightedELBO(1, gradient=rule, vectorize_particles=v) for v in (True, False)
        ]
        parameters = stored_parameters(elbos[0], programs.model, programs.guide)
        found = [gradient(e, programs.model, programs.guide, parameters, 0) for e in elbos]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_one_particle_is_unbiased_under_stl_and_dreg(rule):
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64))
    rules = ("pathwise", rule)
    model, guide = programs.model, programs.guide
    assert_same_mean(ImportanceWeightedELBO, 1, model, guide, rules, max_plate_nesting=1)


def test_stl_is_biased_for_several_particles():
    """It is documented to be: were it not, the text would be wrong."""
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64))
    elbos = [
        ImportanceWeightedELBO(5, gradient=rule, max_plate_nesting=1)
        for rule in ("pathwise", "stl")
    ]
    parameters = stored_parameters(elbos[0], programs.model, programs.guide)
    draws = [
        torch.stack(
            [gradient(e, programs.model, programs.guide, parameters, s) for s in range(800)]
        )
        for e in elbos
    ]
    difference = draws[1] - draws[0]
    z = difference.mean(0) / (difference.std(0) / 800**0.5)
    assert z.nan_to_num().abs().max() > 6


@pytest.mark.parametrize(("rule", "K"), [("stl", 1), ("dreg", 1), ("dreg", 8)])
def test_no_guide_gradient_at_the_exact_posterior(rule, K):
    x = torch.tensor([0.7, -1.4], **F64)
    slope = torch.tensor(0.5, **F64, requires_grad=True)
    scale = torch.tensor(math.sqrt(0.5), **F64, requires_grad=True)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, scale))

    elbo = ImportanceWeightedELBO(K, gradient=rule)
    for seed in range(5):
        found = gradient(elbo, NormalNormal(x).model, guide, [slope, scale], seed)
        assert found.abs().max() < 1e-10
    plain = gradient(ImportanceWeightedELBO(K), NormalNormal(x).model, guide, [slope, scale], 0)
    assert plain.abs().max() > 1e-2


@pytest.mark.parametrize("make", [ImportanceWeightedELBO, JackknifeELBO])
def test_dreg_is_quieter_near_the_posterior(make):
    x = torch.tensor([0.7, -1.4], **F64)
    slope = torch.tensor(0.48, **F64, requires_grad=True)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(slope * x, 0.75))

    model = NormalNormal(x).model
    deviation = {}
    for rule in ("pathwise", "dreg"):
        elbo = make(20, gradient=rule, max_plate_nesting=1)
        draws = [gradient(elbo, model, guide, [slope], seed) for seed in range(200)]
        deviation[rule] = torch.cat(draws).std()
    assert deviation["dreg"] < deviation["pathwise"] / 4


@VECTORIZE
def test_subsampled_plate(vectorize):
    x = torch.linspace(-2, 2, 6, **F64)
    slope = torch.tensor(0.2, **F64, requires_grad=True)
    programs = NormalNormal(x, subsample_size=2)

    def guide():
        with programs.plate() as index:
            pyro.sample("z", dist.Normal(slope * x[index], 1.0))

    draws = {}
    for rule in ("pathwise", "dreg"):
        elbo = ImportanceWeightedELBO(
            4, gradient=rule, vectorize_particles=vectorize, max_plate_nesting=1
        )
        found = [gradient(elbo, programs.model, guide, [slope], seed) for seed in range(300)]
        draws[rule] = torch.stack(found)
    assert_mean(draws["dreg"] - draws["pathwise"], 0.0)


def positive_model():
    loc = pyro.param("loc", torch.tensor(0.3, **F64))
    with pyro.plate("data", 2):
        rate = pyro.sample("rate", dist.LogNormal(loc, torch.tensor(0.5, **F64)))
        pyro.sample("x", dist.Exponential(rate), obs=torch.tensor([0.4, 2.0], **F64))


def global_model():
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, **F64), 0.5))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
    x = torch.tensor([0.5, -1.0], **F64)
    pyro.sample("x", dist.Normal(loc, scale.unsqueeze(-1)).to_event(1), obs=x)


def gaussian_model():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
    x = torch.tensor([0.5, -1.0], **F64)
    pyro.sample("x", dist.Normal(loc + loc.flip(-1) / 2, 1.0).to_event(1), obs=x)


def list_guide(model):
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDelta(poutine.block(model, expose=["scale"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["loc"])))
    return guide


AUTOGUIDES = {
    "AutoNormal": (positive_model, autoguide.AutoNormal),
    "AutoDiagonalNormal": (global_model, autoguide.AutoDiagonalNormal),
    "AutoMultivariateNormal": (global_model, autoguide.AutoMultivariateNormal),
    # A flow starts wide: with a scale among the latents, the gradients would have heavy tails.
    "AutoIAFNormal": (gaussian_model, lambda m: autoguide.AutoIAFNormal(m, hidden_dim=[8])),
    "AutoStructured": (
        global_model,
        lambda m: autoguide.AutoStructured(
            m,
            conditionals={"scale": "normal", "loc": "mvn"},
            dependencies={"loc": {"scale": "linear"}},
        ),
    ),
    "AutoDelta in a list": (global_model, list_guide),
}


@pytest.mark.parametrize(("model", "make_guide"), AUTOGUIDES.values(), ids=AUTOGUIDES)
@pytest.mark.parametrize(("make", "K"), [(ImportanceWeightedELBO, 3), (JackknifeELBO, 4)])
def test_autoguides(model, make_guide, make, K):
    torch.set_default_dtype(torch.float64)
    try:
        guide = make_guide(model)
        assert_same_mean(make, K, model, guide, max_plate_nesting=1, num_seeds=250)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_transformed_guide_with_a_network_and_event_dims():
    x = torch.tensor([[0.5, 1.0], [-0.4, 0.2]], **F64)
    encoder = nn.Linear(2, 4).double()

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2, **F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        base = dist.Normal(loc, log_scale.exp())
        with pyro.plate("data", 2):
            pyro.sample(
                "z", dist.TransformedDistribution(base, [transforms.ExpTransform()]).to_event(1)
            )

    assert_same_mean(ImportanceWeightedELBO, 3, model, guide, max_plate_nesting=1)


def test_masks_and_scales_of_one_guide_site():
    """A draw's log q enters with a factor, and so does the term that DReG replaces."""
    x = torch.tensor(0.5, **F64)
    slope, second = replicated(0.2, 0.1)
    mask = torch.arange(REPLICATES) % 2 == 0

    def model():
        with pyro.plate("replicates", REPLICATES):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            c = pyro.sample("c", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(slope * x, 0.8))
            with poutine.scale(scale=0.4):
                b = pyro.sample("b", dist.Normal(a + second, 0.9))
            pyro.sample("c", dist.Normal(b + slope, 0.7).mask(mask))

    pathwise, dreg = (
        gradient(
            ImportanceWeightedELBO(3, gradient=rule, max_plate_nesting=1),
            model,
            guide,
            [slope, second],
            seed=0,
        ).view(2, -1)
        for rule in ("pathwise", "dreg")
    )
    for where in (mask, ~mask):
        assert_mean((dreg - pathwise)[:, where].T, 0.0)


def test_a_mask_inside_of_other_distributions_is_refused_by_name():
    loc = torch.zeros(2, requires_grad=True)

    def guide():
        mask = torch.tensor([True, False])
        pyro.sample("z", dist.Normal(loc, 1.0).mask(mask).to_event(1))

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(NotImplementedError, match="'z' has a mask inside of other distributions"):
        ImportanceWeightedELBO(2, gradient="dreg").loss_and_grads(model, guide)


@VECTORIZE
@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_flows_without_an_inverse_are_refused_by_name(rule, vectorize):
    flow = transforms.Planar(2)

    def guide():
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    elbo = ImportanceWeightedELBO(2, gradient=rule, vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="Guide site 'z' has no density at a given value"):
        elbo.loss_and_grads(model, guide)
    assert all(p.grad is None for p in flow.parameters())
    plain = ImportanceWeightedELBO(2, vectorize_particles=vectorize)
    assert math.isfinite(plain.loss_and_grads(model, guide))


BOUNDS = {
    "importance-weighted": (ImportanceWeightedELBO, log_mean_exp),
    "jackknife": (JackknifeELBO, lambda log_w: jackknife(log_w, 1)),
}


@pytest.mark.parametrize(("make", "bound"), BOUNDS.values(), ids=BOUNDS)
def test_bernoulli_latents_against_the_sum_over_all_tuples(make, bound):
    K, x = 3, 0.8
    logit, weight = replicated(0.4, 1.5)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, **F64)))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=torch.tensor(x, **F64))

    def guide():
        with pyro.plate("replicates", REPLICATES):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    found = gradient(make(K), model, guide, [logit, weight], seed=0).view(2, -1).T

    one_logit, one_weight = (p[0].detach().requires_grad_() for p in (logit, weight))
    exact = 0.0
    for values in itertools.product([0.0, 1.0], repeat=K):
        z = torch.tensor(values, **F64)
        log_q = dist.Bernoulli(logits=one_logit).log_prob(z)
        log_p = dist.Bernoulli(torch.tensor(0.3, **F64)).log_prob(z)
        log_p = log_p + dist.Normal(one_weight * z, 1.0).log_prob(torch.tensor(x, **F64))
        exact = exact + log_q.sum().exp() * bound(log_p - log_q)
    expected = torch.stack(torch.autograd.grad(exact, [one_logit, one_weight]))
    assert_mean(found, expected)


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
@pytest.mark.parametrize("K", [1, 2])
def test_a_discrete_site_after_a_reparameterized_one_against_quadrature(rule, K):
    """z ~ N(a, s), d | z ~ Bernoulli(c + 2 z), x | z, d ~ N(z + 1.5 d, 1)."""
    x = torch.tensor(0.9, **F64)
    a, s, c = replicated(0.3, 0.8, -0.5)

    def log_p(z, d):
        log_prior = dist.Normal(x.new_zeros(()), 1.0).log_prob(z)
        log_prior = log_prior + dist.Bernoulli(torch.tensor(0.4, **F64)).log_prob(d)
        return log_prior + dist.Normal(z + 1.5 * d, 1.0).log_prob(x)

    def model():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.4, **F64)))
            pyro.sample("x", dist.Normal(z + 1.5 * d, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES):
            z = pyro.sample("z", dist.Normal(a, s))
            pyro.sample("d", dist.Bernoulli(logits=c + 2 * z))

    elbo = ImportanceWeightedELBO(K, gradient=rule)
    found = gradient(elbo, model, guide, [a, s, c], seed=1).view(3, -1).T

    one = [p[0].detach().requires_grad_() for p in (a, s, c)]
    noise = torch.linspace(-8, 8, 401, **F64)
    mass = dist.Normal(noise.new_zeros(()), 1.0).log_prob(noise).exp() * (noise[1] - noise[0])
    z = one[0] + one[1] * noise
    log_w, q = [], []
    for d in (torch.zeros_like(z), torch.ones_like(z)):
        log_q_d = dist.Bernoulli(logits=one[2] + 2 * z).log_prob(d)
        log_w.append(log_p(z, d) - dist.Normal(one[0], one[1]).log_prob(z) - log_q_d)
        q.append(mass * log_q_d.exp())
    log_w, q = torch.cat(log_w), torch.cat(q)
    if K == 1:
        exact = (q * log_w).sum()
    else:
        pairs = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None, :]))
        exact = (q[:, None] * q[None, :] * log_mean_exp(pairs)).sum()
    expected = torch.stack(torch.autograd.grad(exact, one))
    assert_mean(found, expected)


@VECTORIZE
@pytest.mark.parametrize("family", ["Categorical", "Poisson"])
def test_other_discrete_families_have_the_mean_of_the_elbo(family, vectorize):
    """One particle: the mean gradient is that of Trace_ELBO, which has its own score function."""
    parameter = torch.tensor([0.2, -0.3, 0.5], **F64, requires_grad=True)

    def make(p):
        return dist.Categorical(logits=p) if family == "Categorical" else dist.Poisson(p[0].exp())

    def model():
        k = pyro.sample("k", make(torch.zeros(3, **F64)))
        pyro.sample("x", dist.Normal(k.double(), 1.0), obs=torch.tensor(1.2, **F64))

    def guide():
        pyro.sample("k", make(parameter))

    ours = ImportanceWeightedELBO(1, vectorize_particles=vectorize)
    draws = [
        torch.stack([gradient(elbo, model, guide, [parameter], s) for s in range(500)])
        for elbo in (ours, Trace_ELBO())
    ]
    assert_mean(draws[0] - draws[1], 0.0)
    several = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
    assert gradient(several, model, guide, [parameter], 0).isfinite().all()


def test_renyi_elbo_of_pyro_has_no_guide_gradient_for_discrete_sites():
    logit = torch.tensor(0.4, **F64, requires_grad=True)
    prior_logit = torch.tensor(-0.5, **F64)

    def model():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("prior", prior_logit)))

    def guide():
        pyro.param("logit", logit)
        pyro.sample("z", dist.Bernoulli(logits=logit))

    theirs = RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    theirs.loss_and_grads(model, guide)
    assert logit.grad is None or logit.grad == 0
    ours = ImportanceWeightedELBO(4, max_plate_nesting=0)
    draws = torch.stack([gradient(ours, model, guide, [logit], s) for s in range(400)])
    assert draws.mean() < -4.5 * draws.std() / 20


@EVERY_ESTIMATOR
def test_signal_of_a_bound_is_its_definition(make, smallest):
    K = smallest + 2
    elbo = make(K)
    if isinstance(elbo, ThermodynamicELBO):
        pytest.skip("has a covariance in its place, which the next test checks")
    log_w = 3 * torch.randn(K, 4, **F64)
    signal = elbo.learning_signal(log_w)
    assert signal.shape == log_w.shape
    for k in range(K):
        replaced = log_w.clone()
        replaced[k] = torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)
        torch.testing.assert_close(signal[k], elbo.bound(log_w) - elbo.bound(replaced))
    torch.testing.assert_close(signal, MultiSampleELBO.learning_signal(elbo, log_w))


def test_signal_of_the_thermodynamic_bound_is_the_covariance():
    elbo = ThermodynamicELBO(4, betas=[0.0, 0.3, 1.0])
    log_w = torch.randn(4, **F64)
    expected = torch.zeros(4, **F64)
    for beta, width in ((0.0, 0.3), (0.3, 0.7)):
        v = (log_w.exp() ** beta) / (log_w.exp() ** beta).sum()
        expected += width * v * (log_w - (v * log_w).sum())
    torch.testing.assert_close(elbo.learning_signal(log_w), expected)


@VECTORIZE
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_piwae_trains_the_model_by_one_bound_and_the_guide_by_another(rule, vectorize):
    x = torch.tensor([0.5, -1.0], **F64)
    weight = torch.tensor(0.8, **F64, requires_grad=True)
    slope, logit = (torch.tensor(v, **F64, requires_grad=True) for v in (0.3, 0.2))

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            d = pyro.sample("d", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(weight * z + d, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(slope * x, 1.0))
            pyro.sample("d", dist.Bernoulli(logits=logit + z))

    options = {"gradient": rule, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    parameters = [weight, slope, logit]
    found = gradient(PartiallyImportanceWeightedELBO(6, 3, **options), model, guide, parameters, 0)
    of_model = gradient(ImportanceWeightedELBO(6, **options), model, guide, parameters, 0)
    elbo = MultiplyImportanceWeightedELBO(6, 3, **options)
    of_guide = gradient(elbo, model, guide, parameters, 0)
    torch.testing.assert_close(found, torch.cat([of_model[:1], of_guide[1:]]))
    assert not torch.allclose(of_model, of_guide)


def test_signal_where_all_the_others_are_zero():
    elbo = ImportanceWeightedELBO(3)
    log_w = torch.tensor([-math.inf, 1.0, -math.inf], **F64)
    for signal in (elbo.learning_signal(log_w), MultiSampleELBO.learning_signal(elbo, log_w)):
        assert signal.isfinite().all()
        assert signal[1] == elbo.bound(log_w)
    assert elbo.learning_signal(log_w[1:2]) == elbo.learning_signal(log_w[1:2])


@pytest.mark.parametrize("rule", ["stl", "dreg"])
def test_only_discrete_sites_are_refused(rule):
    logit = torch.tensor(0.4, requires_grad=True)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))

    elbo = ImportanceWeightedELBO(3, gradient=rule)
    assert math.isfinite(elbo.loss(model, guide))
    with pytest.raises(
        ValueError, match=r"a reparameterised site with parameters in the guide, got only \['z'"
    ):
        elbo.loss_and_grads(model, guide)
    assert logit.grad is None


def test_piwae_takes_a_guide_of_discrete_sites_alone():
    logit = torch.tensor(0.4, **F64, requires_grad=True)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, **F64)))

    found = [
        gradient(cls(4, 2, max_plate_nesting=0), model, guide, [logit], 0)
        for cls in (PartiallyImportanceWeightedELBO, MultiplyImportanceWeightedELBO)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_particles_of_weight_zero_leave_the_gradient_finite(rule, size):
    a = torch.tensor(0.3, **F64, requires_grad=True)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
            pyro.factor("cut", torch.where(z > 0, 0.0, -math.inf))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0], **F64))

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(a, 1.0))

    elbo = ImportanceWeightedELBO(8, gradient=rule, particle_chunk_size=size, max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(model, guide))
    assert a.grad.isfinite()
    assert a.grad != 0


@pytest.mark.parametrize("size", [None, 4])
def test_a_group_of_zero_weights_is_refused_for_the_guide(size):
    a = torch.tensor(0.3, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        particle = torch.arange(z.numel()).reshape(z.shape)
        pyro.factor("cut", torch.where(particle < 2, -math.inf, 0.0) + 0 * z)

    def guide():
        pyro.sample("z", dist.Normal(a, 1.0))

    elbo = PartiallyImportanceWeightedELBO(8, 4, particle_chunk_size=size, max_plate_nesting=0)
    with pytest.raises(ValueError, match="site 'cut' of the model is infinite"):
        elbo.loss_and_grads(model, guide)
    assert a.grad is None


@pytest.mark.slow
def test_signal_to_noise_falls_for_the_plain_gradient_and_rises_for_dreg():
    path = Path(__file__).parents[2] / "benchmarks" / "signal_to_noise.py"
    benchmark = runpy.run_path(str(path))
    ratios = benchmark["signal_to_noise"]()
    assert benchmark["slope"](ratios["pathwise"]) == pytest.approx(-0.5, abs=0.1)
    assert benchmark["slope"](ratios["dreg"]) == pytest.approx(0.5, abs=0.1)
