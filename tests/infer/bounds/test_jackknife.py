"""Training with the jackknife: the guide on the importance-weighted bound, the model on g_k."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO
from pyro_ext.ops import jackknife, jackknife_derivatives
from pyro_ext.tracing import Programs
from tests.infer.gradients.estimates import F64, gradient
from tests.statistics import assert_mean


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("K", [4, 16])
def test_the_gradient_of_the_model_against_gamma_weights(K, order):
    """w ~ Gamma(a, 1) and a model with d log p / d theta = log w, where E_p is digamma(a + 1).

    The weights of the importance-weighted bound have the bias -1 / (K a), which has no further
    terms. By linearity, the jackknife of any order m >= 1 has none.
    """
    a = torch.tensor(1.0, **F64)
    pyro.set_rng_seed(0)
    log_w = dist.Gamma(a, 1.0).sample((K, 200_000)).log()
    error = log_w - torch.digamma(a + 1)
    elbo = JackknifeELBO(K, order, weights="nonnegative")
    published, _ = elbo.derivatives(log_w)
    assert_mean((log_w.softmax(0) * error).sum(0), -1 / (K * a))
    assert_mean((published * error).sum(0), 0.0)
    bias = (elbo.model_weights(log_w) * error).sum(0).mean().abs()
    assert bias < {4: 0.7, 16: 0.05}[K] / (K * a)


def test_the_weights_of_the_model():
    pyro.set_rng_seed(0)
    K, log_w = 6, 3 * torch.randn(6, 1000, **F64)
    softmax = log_w.softmax(0)
    firsts = [jackknife_derivatives(log_w, order)[0] for order in range(4)]
    torch.testing.assert_close(firsts[0], softmax)
    inverse = 1 / (1 - softmax)
    factor = 1 / K + (1 - 1 / K) * (inverse - (softmax**2 * inverse).sum(0))
    torch.testing.assert_close(firsts[1], softmax * factor)  # as the docstring says
    for order in (1, 2, 3):
        weights = JackknifeELBO(K, order, weights="nonnegative").model_weights(log_w)
        orders = []
        for column in range(1000):
            even = [m for m in range(order + 1) if (firsts[m][:, column] >= 0).all()]
            orders.append(even[-1])
            torch.testing.assert_close(weights[:, column], firsts[even[-1]][:, column])
        assert {0, order} <= set(orders)
        torch.testing.assert_close(JackknifeELBO(K, order).model_weights(log_w), softmax)
        published = JackknifeELBO(K, order, weights="published").model_weights(log_w)
        torch.testing.assert_close(published, firsts[order])


def test_weights_of_zero_get_a_lower_order():
    log_w = torch.tensor([-math.inf, -math.inf, 0.0, 1.0], **F64)
    weights = JackknifeELBO(4, 2, weights="nonnegative").model_weights(log_w)
    torch.testing.assert_close(weights, log_w.softmax(0))
    assert JackknifeELBO(4, 2, weights="published").model_weights(log_w).isnan().any()


def autoencoder(x):
    weight, slope = (torch.tensor(v, **F64, requires_grad=True) for v in (0.8, 0.3))

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 0.3), obs=x)

    def guide():
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0))

    return model, guide, [weight, slope]


@pytest.mark.parametrize(
    "options", [{}, {"vectorize_particles": False}], ids=["at once", "in turn"]
)
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("guide_bound", ["importance-weighted", "jackknife"])
@pytest.mark.parametrize("weights", ["importance-weighted", "nonnegative", "published"])
def test_every_rule_trains_model_and_guide_apart(weights, guide_bound, rule, options):
    model, guide, parameters = autoencoder(torch.tensor([0.5, -1.0, 3.0], **F64))
    options = {"gradient": rule, "max_plate_nesting": 1, **options}
    elbo = JackknifeELBO(6, 1, guide_bound, weights, **options)
    found = gradient(elbo, model, guide, parameters, seed=0)

    guides = {
        "importance-weighted": ImportanceWeightedELBO(6, **options),
        "jackknife": JackknifeELBO(6, 1, "jackknife", "published", **options),
    }
    of_guide = gradient(guides[guide_bound], model, guide, parameters, seed=0)
    pyro.set_rng_seed(0)
    log_w, particles = (lambda p: (p.log_w.detach(), p))(elbo.trace_particles(model, guide))
    (of_model,) = torch.autograd.grad(
        (elbo.model_weights(log_w) * particles.log_p).sum(), parameters[:1]
    )
    torch.testing.assert_close(found, torch.stack([of_model, of_guide[1]]))

    pyro.set_rng_seed(0)
    assert elbo.loss(model, guide) == pytest.approx(-jackknife(log_w, 1).sum().item())


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_chunks_have_the_same_gradient(rule):
    model, guide, parameters = autoencoder(torch.tensor([0.5, -1.0, 3.0], **F64))
    found = []
    for size in (None, 4):
        elbo = JackknifeELBO(
            12, 1, gradient=rule, particle_chunk_size=size, vectorize_particles=False
        )
        pyro.set_rng_seed(0)
        for p in parameters:
            p.grad = None
        if size is None:
            elbo.tracer.run_first(Programs(model, guide))  # as chunks do
        elbo.loss_and_grads(model, guide)
        found.append(torch.stack([p.grad for p in parameters]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_by_default_training_is_that_of_the_importance_weighted_bound(rule):
    model, guide, parameters = autoencoder(torch.tensor([0.5, -1.0, 3.0], **F64))
    options = {"gradient": rule, "max_plate_nesting": 1}
    found, expected = (
        gradient(elbo, model, guide, parameters, seed=0)
        for elbo in (JackknifeELBO(6, 2, **options), ImportanceWeightedELBO(6, **options))
    )
    torch.testing.assert_close(found, expected)


def test_order_zero_is_the_importance_weighted_bound():
    elbo = JackknifeELBO(4, 0)
    assert elbo.guide_bound is elbo
    log_w = torch.randn(4, 5, **F64)
    torch.testing.assert_close(elbo.model_weights(log_w), log_w.softmax(0))


def test_bad_options():
    with pytest.raises(ValueError, match=r"guide must be one of .* but it is 'iwae'"):
        JackknifeELBO(4, 1, guide="iwae")
    with pytest.raises(ValueError, match=r"weights must be one of .* but it is None"):
        JackknifeELBO(4, 1, weights=None)
