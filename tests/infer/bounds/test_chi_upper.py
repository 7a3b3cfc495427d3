"""ChiUpperELBO against closed forms: Gaussians, enumeration, quadrature."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import constraints

from pyro_ext.infer import ChiUpperELBO, ImportanceWeightedELBO
from pyro_ext.ops import WeightStatistics
from tests.infer.gradients.estimates import F64, gradient
from tests.registry import VECTORIZE
from tests.statistics import assert_mean

LOC, SCALE, OFFSET = (torch.tensor(v, **F64, requires_grad=True) for v in (0.3, 1.3, -1.7))


def exact(order, loc, scale):
    """The CUBO of z ~ N(0, 1) with a factor e^OFFSET, and q = N(loc, scale)."""
    a = order - (order - 1) / scale**2
    b = (order - 1) * loc / scale**2
    quadratic = b**2 / (2 * a) + (order - 1) * loc**2 / (2 * scale**2)
    return OFFSET + ((order - 1) * scale.log() - a.log() / 2 + quadratic) / order


def model():
    pyro.sample("z", dist.Normal(LOC.new_zeros(()), 1.0))
    pyro.factor("offset", OFFSET)


def guide():
    pyro.sample("z", dist.Normal(LOC, SCALE))


@pytest.mark.parametrize("order", [1.5, 2.0, 3.0])
def test_upper_bound_of_gaussians(order):
    elbo = ChiUpperELBO(200_000, order)
    with torch.no_grad():
        log_w = elbo.trace_particles(model, guide).log_w
    statistics = WeightStatistics(len(log_w))
    statistics.update(order * log_w)
    error = statistics.std_error / order
    assert (elbo.upper_bound(log_w) - exact(order, LOC, SCALE)).abs() < 4.5 * error
    assert error < 0.002
    assert elbo.bound(log_w) < OFFSET + 0.002 < elbo.upper_bound(log_w)


@pytest.mark.parametrize("order", [1.5, 3.0])
@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_gradient_is_that_of_the_cubo_for_many_particles(rule, order):
    elbo = ChiUpperELBO(20_000, order, rule, max_plate_nesting=0)
    draws = torch.stack([gradient(elbo, model, guide, [LOC, SCALE], s) for s in range(20)])
    expected = torch.autograd.grad(-exact(order, LOC, SCALE), [LOC, SCALE])
    assert_mean(draws, torch.stack(expected))
    assert (draws.std(0) < 0.05).all()


def test_order_one_is_the_evidence_and_the_bound_increases():
    log_w = 2 * torch.randn(7, 5, **F64)
    bounds = [ChiUpperELBO(7, order).upper_bound(log_w) for order in (1 + 1e-9, 1.5, 2.0, 9.0)]
    torch.testing.assert_close(bounds[0], ChiUpperELBO(7).bound(log_w))
    for lower, upper in pairwise(bounds):
        assert (lower < upper).all()
    assert (bounds[-1] < log_w.amax(0)).all()


def test_guide_derivatives_are_those_of_the_power_mean_for_a_constant_divisor():
    log_w = torch.randn(5, 3, **F64, requires_grad=True)
    objective = ChiUpperELBO(5, 2.5).guide_bound
    divisor = (2.5 * log_w).exp().sum(0).detach()
    value = -((2.5 * log_w).exp().sum(0) / divisor / 2.5).sum()
    (first,) = torch.autograd.grad(value, log_w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), log_w)
    torch.testing.assert_close(objective.derivatives(log_w.detach()), (first.detach(), second))


def test_one_particle_is_the_elbo():
    for rule in ("pathwise", "dreg"):
        found, expected = (
            gradient(make(1, gradient=rule, max_plate_nesting=0), model, guide, [LOC, SCALE], 0)
            for make in (ChiUpperELBO, ImportanceWeightedELBO)
        )
        torch.testing.assert_close(found, expected)


@VECTORIZE
@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_the_model_trains_on_the_importance_weighted_bound(rule, vectorize):
    x, weight = torch.tensor([0.5, -1.0], **F64), torch.tensor(0.8, **F64, requires_grad=True)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(LOC * x, SCALE))

    options = {"gradient": rule, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    found, expected = (
        gradient(make(6, **options), model, guide, [weight, LOC], 0)
        for make in (ChiUpperELBO, ImportanceWeightedELBO)
    )
    torch.testing.assert_close(found[0], expected[0])
    assert (found[1] - expected[1]).abs() > 1e-3


def enumerated(logits, order):
    """The CUBO of a discrete and a continuous site: E over d of the closed form given d."""
    loc_1, logit = logits
    log_prior = torch.tensor([0.7, 0.3], **F64).log()
    log_q = torch.stack([-logit, logit]).sigmoid().log()
    locs = torch.stack([LOC.detach(), loc_1])
    given = order * (exact(order, locs, SCALE.detach()) - OFFSET.detach())
    return torch.logsumexp(order * log_prior + (1 - order) * log_q + given, 0) / order


@pytest.mark.parametrize("rule", ["pathwise", "dreg"])
def test_discrete_sites_against_enumeration(rule):
    order = 2.5
    loc, logit = (torch.tensor(v, **F64, requires_grad=True) for v in (-0.4, 0.3))

    def model():
        pyro.sample("d", dist.Bernoulli(torch.tensor(0.3, **F64)))
        pyro.sample("z", dist.Normal(loc.new_zeros(()), 1.0))

    def guide():
        d = pyro.sample("d", dist.Bernoulli(logits=logit))
        pyro.sample("z", dist.Normal(torch.where(d > 0, loc, LOC.detach()), SCALE.detach()))

    elbo = ChiUpperELBO(20_000, order, rule, max_plate_nesting=0)
    draws = torch.stack([gradient(elbo, model, guide, [loc, logit], s) for s in range(20)])
    expected = torch.autograd.grad(-enumerated((loc, logit), order), [loc, logit])
    assert_mean(draws, torch.stack(expected))
    assert (draws.std(0) < 0.05).all()


def test_discrete_site_after_a_continuous_one():
    """Both rules have the same mean, although d depends on the draw of z."""
    logit = torch.tensor(0.3, **F64, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(LOC.new_zeros(()), 1.0))
        pyro.sample("d", dist.Bernoulli(logits=0.5 * z))

    def guide():
        z = pyro.sample("z", dist.Normal(LOC, SCALE))
        pyro.sample("d", dist.Bernoulli(logits=logit - z))

    pathwise, dreg = (
        torch.stack(
            [
                gradient(
                    ChiUpperELBO(5000, gradient=rule, max_plate_nesting=0),
                    model,
                    guide,
                    [LOC, SCALE, logit],
                    seed,
                )
                for seed in range(20)
            ]
        )
        for rule in ("pathwise", "dreg")
    )
    assert_mean(dreg - pathwise, 0.0)


def log_skew(z):
    """The factor that turns a standard normal into a skew normal of the same total mass."""
    return math.log(2) + torch.special.log_ndtr(5 * z)


def trained_scale(elbo, num_steps=300):
    """The scale of a Gaussian guide of the skew normal."""
    pyro.clear_param_store()

    def skewed():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("skew", log_skew(z))

    def normal():
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.3), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))

    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(skewed, normal, optim, elbo)
    for _ in range(num_steps):
        svi.step()
    return pyro.param("scale").item()


def best_scale(order):
    """The scale that minimises the CUBO (the negative ELBO for order 0), by quadrature."""
    z = torch.linspace(-12.0, 12.0, 20_001, **F64)
    log_p = dist.Normal(z.new_zeros(()), 1.0).log_prob(z) + log_skew(z)
    loc, log_scale = (torch.tensor(v, **F64, requires_grad=True) for v in (0.8, -0.2))
    optimizer = torch.optim.LBFGS([loc, log_scale], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        log_q = dist.Normal(loc, log_scale.exp()).log_prob(z)
        if order:
            loss = torch.logsumexp(order * log_p + (1 - order) * log_q, 0) / order
        else:
            loss = (log_q.exp() * (log_q - log_p)).sum() * (z[1] - z[0])
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_scale.exp().item()


@pytest.mark.long
def test_guide_of_a_skewed_target_is_wider_than_that_of_the_elbo():
    narrow = trained_scale(Trace_ELBO(50, vectorize_particles=True))
    wide = trained_scale(ChiUpperELBO(500, order=1.5, max_plate_nesting=0))
    # In repeated runs, the scales have a standard deviation of 1 %.
    assert narrow == pytest.approx(best_scale(0), rel=0.05)
    assert wide == pytest.approx(best_scale(1.5), rel=0.05)
    assert best_scale(1.5) > 1.25 * best_scale(0)


ERRORS = {
    "order 1": ({"order": 1}, ValueError, "order must be above 1 and finite, but it is 1"),
    "order 0.5": ({"order": 0.5}, ValueError, r"order must be at least 1, but it is 0\.5"),
    "infinite order": ({"order": math.inf}, ValueError, "above 1 and finite, but it is inf"),
    "order": ({"order": "2"}, TypeError, "order must be a number"),
    "stl": ({"gradient": "stl"}, ValueError, "'stl' drops a term.*gradient='dreg'"),
    "local plate": ({"local_plate": "data"}, ValueError, "local_plate does not go with"),
}


@pytest.mark.parametrize(("options", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_refuses_wrong_options(options, error, message):
    with pytest.raises(error, match=f"ChiUpperELBO: .*{message}"):
        ChiUpperELBO(4, **options)
