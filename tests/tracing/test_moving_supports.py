import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    SigmoidTransform,
)

from pyro_ext.infer import ImportanceWeightedELBO
from tests.statistics import assert_mean

B = 1.5


class WithoutSupport(dist.Normal):
    @property
    def support(self):
        raise NotImplementedError


MOVING = {
    "uniform": lambda p: dist.Uniform(0.0, p),
    "uniform in an event": lambda p: dist.Uniform(torch.zeros(2), p).to_event(1),
    "transformed uniform": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, p), [ExpTransform()]
    ),
    "shifted uniform": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [AffineTransform(p, 1.0)]
    ),
    "scaled uniform": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [AffineTransform(0.0, p)]
    ),
    "shifted exponential": lambda p: dist.TransformedDistribution(
        dist.Exponential(1.0), [AffineTransform(p, 1.0)]
    ),
    "scaled and transformed uniform": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [AffineTransform(0.0, p), ExpTransform()]
    ),
    "transformed and scaled uniform": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [ExpTransform(), AffineTransform(0.0, p)]
    ),
    "composed": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [ComposeTransform([AffineTransform(0.0, p)])]
    ),
    "inverse": lambda p: dist.TransformedDistribution(
        dist.Uniform(0.0, 1.0), [AffineTransform(0.0, 1 / p).inv]
    ),
    "inverse of a shift and scale": lambda p: dist.TransformedDistribution(
        dist.Exponential(1.0), [AffineTransform(2.0, p).inv]
    ),
    "nested": lambda p: dist.TransformedDistribution(
        dist.TransformedDistribution(dist.Uniform(0.0, 1.0), [AffineTransform(0.0, 2.0)]),
        [AffineTransform(0.0, p)],
    ),
    "mixture by a mask": lambda p: dist.MaskedMixture(
        torch.tensor(True), dist.Uniform(0.0, p), dist.Uniform(0.0, p)
    ),
    "pareto": lambda p: dist.Pareto(p, 2.0),
}
FIXED = {
    "normal": lambda p: dist.Normal(p, p),
    "shifted normal": lambda p: dist.TransformedDistribution(
        dist.Normal(0.0, 1.0), [AffineTransform(p, p)]
    ),
    "log normal": lambda p: dist.LogNormal(p, p),
    "gamma": lambda p: dist.Gamma(p, p),
    "beta": lambda p: dist.Beta(p, p),
    "scaled exponential": lambda p: dist.TransformedDistribution(
        dist.Exponential(1.0), [AffineTransform(0.0, p)]
    ),
    "exponential over a scale": lambda p: dist.TransformedDistribution(
        dist.Exponential(1.0), [AffineTransform(0.0, p).inv]
    ),
    "weibull": lambda p: dist.Weibull(p, p),
    "gumbel": lambda p: dist.Gumbel(p, p),
    "kumaraswamy": lambda p: dist.Kumaraswamy(p, p),
    "logit normal": lambda p: dist.TransformedDistribution(dist.Normal(p, p), [SigmoidTransform()]),
    "log weibull": lambda p: dist.TransformedDistribution(
        dist.Weibull(p, p), [ExpTransform().inv, AffineTransform(p, p)]
    ),
    "masked": lambda p: dist.Normal(p, p).mask(True),
    "without support": lambda p: WithoutSupport(p, p, validate_args=False),
}


def programs(make):
    parameter = torch.tensor(B, requires_grad=True)

    def model():
        pyro.sample("z", make(torch.tensor(1.6)))

    def guide():
        pyro.sample("z", make(parameter))

    return model, guide


@pytest.mark.parametrize("rule", ["stl", "dreg"])
@pytest.mark.parametrize("make", MOVING.values(), ids=MOVING)
def test_moving_supports_are_refused_by_rules_with_leaves(make, rule):
    elbo = ImportanceWeightedELBO(3, gradient=rule, max_plate_nesting=0)
    with pytest.raises(ValueError, match=r"^Guide site 'z' has a support with a bound"):
        elbo.differentiable_loss(*programs(make))


@pytest.mark.parametrize("rule", ["stl", "dreg"])
@pytest.mark.parametrize("make", FIXED.values(), ids=FIXED)
def test_fixed_supports_are_not(make, rule):
    elbo = ImportanceWeightedELBO(3, gradient=rule, max_plate_nesting=0)
    elbo.differentiable_loss(*programs(make)).backward()


def test_the_pathwise_rule_takes_a_moving_support():
    """KL(U(0, b) | Exponential(1)) = b / 2 - log b, whose derivative is 1 / 2 - 1 / b."""
    pyro.set_rng_seed(0)
    b = torch.full((20_000,), B, requires_grad=True)

    def model():
        with pyro.plate("replicates", len(b)):
            pyro.sample("z", dist.Exponential(torch.ones(())))

    def guide():
        with pyro.plate("replicates", len(b)):
            pyro.sample("z", dist.Uniform(0.0, b))

    loss = ImportanceWeightedELBO(1, max_plate_nesting=1).differentiable_loss(model, guide)
    (gradient,) = torch.autograd.grad(loss, b)
    assert math.isfinite(loss.item())
    assert_mean(gradient, 1 / 2 - 1 / B)
