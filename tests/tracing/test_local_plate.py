"""One draw of the globals, K of the locals in their plate: locally enhanced bounds."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.infer import ImportanceWeightedELBO
from pyro_ext.ops import log_mean_exp
from tests.models import GlobalNormal, Hierarchical
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean, assert_mean_at_most

F64 = {"dtype": torch.float64}
X = torch.tensor([0.3, -1.9, 2.4, -0.2, 3.1], **F64)
VECTORIZE = pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
EVERY_ESTIMATOR = pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
REPLICATES = 4000


def gradient(elbo, model, guide, parameters, seed=0):
    """The gradient of the bound, one row a parameter; replicates have parameters of their own."""
    pyro.set_rng_seed(seed)
    loss = elbo.differentiable_loss(model, guide)
    return -torch.stack(torch.autograd.grad(loss, parameters))


def replicated(*values):
    return [torch.full((REPLICATES, 1), v, **F64).requires_grad_() for v in values]


@VECTORIZE
@pytest.mark.parametrize("subsample_size", [None, 2])
def test_one_draw_of_the_globals_and_k_of_the_locals(subsample_size, vectorize):
    programs = Hierarchical(X, subsample_size)
    elbo = ImportanceWeightedELBO(4, local_plate="data", vectorize_particles=vectorize)
    found = elbo.trace_particles(programs.model, programs.guide)
    size = subsample_size or len(X)
    assert [plate.name for plate in found.plates] == ["data"]
    assert found.log_w.shape == (4, size)
    assert found.scale == len(X) / size
    draws = {trace.nodes["theta"]["value"].item() for trace in found.guide_traces}
    assert len(draws) == 1
    trace = found.model_traces[0]
    theta, z, x = (trace.nodes[name]["value"] for name in ("theta", "z", "x"))
    assert theta.shape == ()
    log_ratio = dist.Normal(0.0, 1.0).log_prob(theta) - dist.Normal(0.1, 0.6).log_prob(theta)
    torch.testing.assert_close(found.outer, log_ratio.double())
    z = z.view(-1, size)[0]
    log_w = dist.Normal(theta, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    log_w = log_w - dist.Normal(0.4 * (theta + x), 1.3).log_prob(z)
    torch.testing.assert_close(found.log_w[0], log_w)


@VECTORIZE
def test_the_bound_is_valid_under_subsampling_and_between_the_elbo_and_the_evidence(vectorize):
    means = {}
    for subsample_size, K in [(None, 1), (None, 8), (2, 8)]:
        programs = Hierarchical(X, subsample_size)
        elbo = ImportanceWeightedELBO(K, local_plate="data", vectorize_particles=vectorize)
        num_draws = 400 if vectorize else 100
        draws = [-elbo.loss(programs.model, programs.guide) for _ in range(num_draws)]
        draws = torch.tensor(draws, **F64)
        assert_mean_at_most(draws, programs.log_evidence())
        means[subsample_size, K] = draws.mean(), draws.var() / len(draws)
    (elbo_mean, _), (full, full_variance), (minibatch, variance) = means.values()
    assert (full - minibatch).abs() < 4.5 * (full_variance + variance).sqrt()
    assert full > elbo_mean + 4.5 * full_variance.sqrt()


@VECTORIZE
@EVERY_ESTIMATOR
def test_the_exact_posterior_gives_the_evidence_and_no_gradient(make, smallest, vectorize):
    programs = Hierarchical(X, exact_guide=True)
    for rule in ("pathwise", "stl", "dreg"):
        elbo = make(smallest + 2, gradient=rule, local_plate="data", vectorize_particles=vectorize)
        loss = elbo.differentiable_loss(programs.model, programs.guide)
        torch.testing.assert_close(-loss, programs.log_evidence())
        if rule != "pathwise":
            parameters = [p for _, p in pyro.get_param_store().named_parameters()]
            assert len(parameters) == 4
            for found in torch.autograd.grad(loss, parameters):
                assert found.abs().max() < 1e-10


def hierarchical_replicates(parameters, subsample_size=None):
    """theta2 | theta1, z2 | z1, theta: each guide site depends on all of the earlier ones."""
    a, b, c, s = parameters
    x = torch.tensor([0.7, -1.2, 0.4], **F64)
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)
    zero = x.new_zeros(())

    def data():
        return pyro.plate("data", len(x), subsample_size=subsample_size, dim=-1)

    def model():
        with replicates:
            theta1 = pyro.sample("theta1", dist.Normal(zero, 1.0))
            theta2 = pyro.sample("theta2", dist.Normal(theta1, 1.0))
            with data() as index:
                z1 = pyro.sample("z1", dist.Normal(theta2 + c, 1.0))
                z2 = pyro.sample("z2", dist.Normal(z1 * theta1, 1.0))
                pyro.sample("x", dist.Normal(z2, 0.7), obs=x[index])

    def guide():
        with replicates:
            theta1 = pyro.sample("theta1", dist.Normal(a, s))
            theta2 = pyro.sample("theta2", dist.Normal(b * theta1, s))
            with data() as index:
                z1 = pyro.sample("z1", dist.Normal(a * x[index] + b * theta2 * theta1, s))
                pyro.sample("z2", dist.Normal(b * z1 + c * theta1, s + theta2**2))

    return model, guide


@EVERY_ESTIMATOR
def test_rules_have_the_same_mean(make, smallest):
    """Paired, with the same noise, on the full data and under subsampling."""
    parameters = replicated(0.4, 0.6, 0.2, 0.9)
    K = max(smallest, 3)
    for subsample_size in (None, 2):
        model, guide = hierarchical_replicates(parameters, subsample_size)
        pathwise, dreg = (
            gradient(
                make(K, gradient=rule, max_plate_nesting=2, local_plate="data"),
                model,
                guide,
                parameters,
            )
            for rule in ("pathwise", "dreg")
        )
        assert_mean((dreg - pathwise)[..., 0].T, 0.0)


def test_looped_and_vectorized_gradients_have_the_same_mean():
    parameters = replicated(0.4, 0.6, 0.2, 0.9)
    model, guide = hierarchical_replicates(parameters)
    for rule in ("pathwise", "dreg"):
        looped, vectorized = (
            gradient(
                ImportanceWeightedELBO(
                    3, gradient=rule, vectorize_particles=v, max_plate_nesting=2, local_plate="data"
                ),
                model,
                guide,
                parameters,
                seed=int(v),
            )[..., 0].T
            for v in (False, True)
        )
        assert_mean(looped - vectorized, 0.0)


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_a_discrete_local_after_a_reparameterized_global_against_quadrature(rule):
    """theta ~ N(a, s), d | theta ~ Bernoulli(c + 2 theta), x | theta, d ~ N(theta + 1.5 d, 1)."""
    x = torch.tensor(0.9, **F64)
    a, s, c = replicated(0.3, 0.8, -0.5)
    standard = dist.Normal(x.new_zeros(()), 1.0)
    prior = dist.Bernoulli(torch.tensor(0.4, **F64))
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)

    def model():
        with replicates:
            theta = pyro.sample("theta", standard)
            with pyro.plate("data", 1, dim=-1):
                d = pyro.sample("d", prior)
                pyro.sample("x", dist.Normal(theta + 1.5 * d, 1.0), obs=x)

    def guide():
        with replicates:
            theta = pyro.sample("theta", dist.Normal(a, s))
            with pyro.plate("data", 1, dim=-1):
                pyro.sample("d", dist.Bernoulli(logits=c + 2 * theta))

    elbo = ImportanceWeightedELBO(2, gradient=rule, max_plate_nesting=2, local_plate="data")
    found = gradient(elbo, model, guide, [a, s, c])[..., 0].T

    one = [p[0, 0].detach().requires_grad_() for p in (a, s, c)]
    noise = torch.linspace(-8, 8, 401, **F64)
    mass = standard.log_prob(noise).exp() * (noise[1] - noise[0])
    theta = one[0] + one[1] * noise
    exact = (mass * (standard.log_prob(theta) - dist.Normal(*one[:2]).log_prob(theta))).sum()
    for pair in itertools.product([0.0, 1.0], repeat=2):
        d = torch.tensor(pair, **F64).unsqueeze(-1)
        log_q = dist.Bernoulli(logits=one[2] + 2 * theta).log_prob(d)
        log_p = prior.log_prob(d) + dist.Normal(theta + 1.5 * d, 1.0).log_prob(x)
        exact = exact + (mass * log_q.sum(0).exp() * log_mean_exp(log_p - log_q)).sum()
    assert_mean(found, torch.stack(torch.autograd.grad(exact, one)))


@VECTORIZE
def test_discrete_globals_and_locals_against_the_sum_over_all_values(vectorize):
    """g ~ Bernoulli(a), d | g ~ Bernoulli(b + c g), x | g, d ~ N(d + g, 1)."""
    x = torch.tensor(0.9, **F64)
    a, b, c = replicated(0.3, 0.4, -0.7)
    prior = dist.Bernoulli(torch.tensor(0.4, **F64))
    replicates = pyro.plate("replicates", REPLICATES, dim=-2)

    def model():
        with replicates:
            g = pyro.sample("g", prior)
            with pyro.plate("data", 1, dim=-1):
                d = pyro.sample("d", prior)
                pyro.sample("x", dist.Normal(d + g, 1.0), obs=x)

    def guide():
        with replicates:
            g = pyro.sample("g", dist.Bernoulli(logits=a))
            with pyro.plate("data", 1, dim=-1):
                pyro.sample("d", dist.Bernoulli(logits=b + c * g))

    K = 2
    elbo = ImportanceWeightedELBO(
        K, max_plate_nesting=2, local_plate="data", vectorize_particles=vectorize
    )
    found = gradient(elbo, model, guide, [a, b, c])[..., 0].T

    one = [p[0, 0].detach().requires_grad_() for p in (a, b, c)]
    exact = 0.0
    for g in torch.tensor([0.0, 1.0], **F64):
        log_q_g = dist.Bernoulli(logits=one[0]).log_prob(g)
        inside = prior.log_prob(g) - log_q_g
        for values in itertools.product([0.0, 1.0], repeat=K):
            d = torch.tensor(values, **F64)
            log_q = dist.Bernoulli(logits=one[1] + one[2] * g).log_prob(d)
            log_p = prior.log_prob(d) + dist.Normal(d + g, 1.0).log_prob(x)
            inside = inside + log_q.sum().exp() * log_mean_exp(log_p - log_q)
        exact = exact + log_q_g.exp() * inside
    assert_mean(found, torch.stack(torch.autograd.grad(exact, one)))


def test_one_particle_is_the_elbo():
    programs = Hierarchical(X, subsample_size=2)
    losses = []
    for elbo in (ImportanceWeightedELBO(1, local_plate="data"), Trace_ELBO()):
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(programs.model, programs.guide))
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_autoguides_train_to_the_posterior_of_the_global(rule):
    programs = Hierarchical(X.float(), subsample_size=2)
    guide = AutoNormal(programs.model)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    elbo = ImportanceWeightedELBO(3, gradient=rule, local_plate="data")
    svi = pyro.infer.SVI(programs.model, guide, optim, elbo)
    for _ in range(400):
        svi.step()
    # theta | x ~ N(sum x / (N + 2), 2 / (N + 2))
    assert guide.median()["theta"].item() == pytest.approx(X.sum().item() / 7, abs=0.25)
    elbo.check(programs.model, guide)


def test_refusal_of_a_subsampled_plate_points_to_the_local_plate():
    programs = Hierarchical(X, subsample_size=2)
    with pytest.raises(ValueError, match="local_plate='data'"):
        ImportanceWeightedELBO(3).loss(programs.model, programs.guide)


@VECTORIZE
def test_sites_outside_that_see_the_local_draws_are_refused_by_name(vectorize):
    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        total = z.sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(total, 1.0), obs=torch.tensor(0.0))

    elbo = ImportanceWeightedELBO(
        3, local_plate="data", vectorize_particles=vectorize, max_plate_nesting=1
    )
    with pytest.raises(ValueError, match="'x' of the model depends on the draws inside"):
        elbo.loss(model, guide)


@VECTORIZE
@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_one_particle_may_see_locals_outside_of_the_plate(rule, vectorize):
    """K = 1 is the ELBO: the global's gradient goes back to the local that it depends on."""
    a = torch.full((REPLICATES, 1), 0.3, **F64, requires_grad=True)
    x = X[:3]

    def model():
        with pyro.plate("replicates", REPLICATES, dim=-2):
            theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("data", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        with pyro.plate("replicates", REPLICATES, dim=-2):
            with pyro.plate("data", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(a + 0.4 * x, 0.7))
            pyro.sample("theta", dist.Normal(0.8 * z.mean(-1, keepdim=True) + a, 0.5))

    found = [
        gradient(
            ImportanceWeightedELBO(
                1, gradient=rule, local_plate=plate, vectorize_particles=vectorize
            ),
            model,
            guide,
            [a],
        )
        for plate in ("data", None)
    ]
    torch.testing.assert_close(*found)


@VECTORIZE
def test_data_of_a_global_inside_of_the_local_plate(vectorize):
    """y depends on theta alone: whether it keeps the inner plate common is the same looped."""
    y, x = X[:3, None], torch.arange(6.0, **F64).reshape(3, 2)

    def model():
        theta = pyro.sample("theta", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
            with pyro.plate("columns", 2, dim=-1):
                z = pyro.sample("z", dist.Normal(theta, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        pyro.sample("theta", dist.Normal(y.new_zeros(()), 0.1))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))

    elbo = ImportanceWeightedELBO(4, local_plate="rows", vectorize_particles=vectorize)
    found = elbo.trace_particles(model, guide)
    assert [plate.name for plate in found.plates] == ["rows", "columns"]


def test_looped_globals_with_a_cached_transform():
    """The first particle scores from the cache, later ones by the inverse."""

    def guide():
        exponential = dist.transforms.ExpTransform(cache_size=1)
        base = dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0)
        pyro.sample("theta", dist.TransformedDistribution(base, [exponential]))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        theta = pyro.sample("theta", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    elbo = ImportanceWeightedELBO(3, local_plate="data", vectorize_particles=False)
    for _ in range(30):
        elbo.loss_and_grads(model, guide)


@VECTORIZE
@pytest.mark.parametrize("family", ["Normal", "Bernoulli"])
@pytest.mark.parametrize("keepdim", [True, False])
def test_every_dependence_outside_is_refused(keepdim, family, vectorize):
    """A discrete draw may be the same in all particles; a sum may run over the particle dim."""

    def draw():
        fn = dist.Normal(0.0, 1.0) if family == "Normal" else dist.Bernoulli(0.4)
        with pyro.plate("data", 1):
            return pyro.sample("z", fn)

    def model():
        z = draw()
        total = z.sum(-1, keepdim=True) if keepdim else z.sum()
        pyro.sample("x", dist.Normal(total, 1.0), obs=total.new_zeros(()))

    options = {"vectorize_particles": vectorize, "max_plate_nesting": 1, "local_plate": "data"}
    for _ in range(5):
        with pytest.raises(ValueError, match="'x' of the model depends on the draws inside"):
            ImportanceWeightedELBO(2, **options).loss(model, draw)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("K", [1, 3])
@VECTORIZE
def test_nan_outside_is_named(vectorize, K):
    def guide():
        pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        nan = torch.tensor(float("nan"))
        pyro.sample("y", dist.Normal(theta, 1.0, validate_args=False), obs=nan)
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    elbo = ImportanceWeightedELBO(K, local_plate="data", vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="log-probability of site 'y' of the model is NaN"):
        elbo.loss(model, guide)


@VECTORIZE
def test_guides_with_one_joint_draw_are_refused(vectorize):
    programs = Hierarchical(X)
    guide = AutoMultivariateNormal(programs.model)
    elbo = ImportanceWeightedELBO(3, local_plate="data", vectorize_particles=vectorize)
    with pytest.raises(ValueError, match="expected the guide to draw a latent site inside"):
        elbo.loss(programs.model, guide)


def test_captured_as_a_graph():
    programs = Hierarchical(X)
    elbo = ImportanceWeightedELBO(3, local_plate="data", max_plate_nesting=1)
    elbo.loss(programs.model, programs.guide)
    parameters = [p for _, p in pyro.get_param_store().named_parameters()]

    def step(_):
        loss = elbo.differentiable_loss(programs.model, programs.guide)
        return loss, *torch.autograd.grad(loss, parameters)

    with pyro.validation_enabled(False):
        graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.zeros(()))
    found = graph(torch.zeros(()))
    assert len(found) == 5
    assert all(x.isfinite().all() for x in found)


def test_bad_arguments():
    with pytest.raises(TypeError, match="local_plate must be the name of a plate, but it is 3"):
        ImportanceWeightedELBO(2, local_plate=3)
    with pytest.raises(NotImplementedError, match="expects particle_chunk_size=None"):
        ImportanceWeightedELBO(20, local_plate="data", particle_chunk_size=5)
    programs = Hierarchical(X)
    with pytest.raises(ValueError, match=r"one of the vectorised plates, \['data'\]"):
        ImportanceWeightedELBO(2, local_plate="rows").loss(programs.model, programs.guide)
    programs = GlobalNormal(X)
    with pytest.raises(ValueError, match=r"a latent site inside of the plate.*got \['x'\]"):
        ImportanceWeightedELBO(2, local_plate="data").loss(programs.model, programs.guide)

    def sequential():
        for i in pyro.plate("data", 2):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"one of the vectorised plates, \[\]"):
        ImportanceWeightedELBO(2, local_plate="data").loss(sequential, sequential)
