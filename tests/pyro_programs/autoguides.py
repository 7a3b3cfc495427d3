"""A Bayesian regression, with a guide by hand and with each automatic guide."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import Tensor

from tests.pyro_programs.program import Pair, program


def data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.0, 1.0, 7)
    return x, 0.5 + 2.0 * x + 0.1 * torch.randn(7)


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    mean = pyro.deterministic("mean", a + b * x) if x.dim() else a + b * x
    with pyro.plate("data", len(x)):
        return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def by_groups(x: Tensor, y: Tensor) -> None:
    """Slopes of three groups around a common one. Each data point has an error of its own."""
    center = pyro.sample("center", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 3):
        slope = pyro.sample("slope", dist.Normal(center, spread))
    with pyro.plate("data", len(x)):
        error = pyro.sample("error", dist.Normal(0.0, 0.3))
        mean = slope[..., torch.arange(len(x)) % 3] * x + error
        pyro.sample("obs", dist.Normal(mean, 0.2), obs=y)


@program()
def regression_by_hand() -> Pair:
    def guide(x: Tensor, y: Tensor | None = None) -> None:
        positive = dist.constraints.positive
        for name in "ab":
            loc = pyro.param(f"{name}_loc", torch.tensor(0.0))
            scale = pyro.param(f"{name}_scale", torch.tensor(0.5), constraint=positive)
            pyro.sample(name, dist.Normal(loc, scale))
        loc = pyro.param("sigma_loc", torch.tensor(-1.0))
        pyro.sample("sigma", dist.LogNormal(loc, torch.tensor(0.1)))

    return regression, guide, data(), {}


@program()
def auto_normal() -> Pair:
    return by_groups, AutoNormal(by_groups), data(), {}


@program()
def auto_diagonal_normal() -> Pair:
    return regression, AutoDiagonalNormal(regression), data(), {}


@program(one_at_a_time=True)
def auto_multivariate_normal() -> Pair:
    """The model's slopes are indexed from the left."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("coefficients", 2):
            slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slopes[0] + slopes[1] * x, 0.2), obs=y)

    return model, AutoMultivariateNormal(model), data(), {}


@program()
def auto_low_rank() -> Pair:
    return by_groups, AutoLowRankMultivariateNormal(by_groups, rank=2), data(), {}


@program()
def auto_iaf() -> Pair:
    return by_groups, AutoIAFNormal(by_groups, hidden_dim=[16]), data(), {}


@program()
def auto_laplace() -> Pair:
    return regression, AutoLaplaceApproximation(regression), data(), {}


@program()
def auto_laplace_normal() -> Pair:
    """The guide after its fit: a joint Normal around the mode."""

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            mean = slope[..., 0] + slope[..., 1] * x
            noise = pyro.param("noise", torch.tensor(0.5), dist.constraints.positive)
            pyro.sample("obs", dist.Normal(mean, noise), obs=y)

    mode = AutoLaplaceApproximation(model)
    mode(*data())
    return model, mode.laplace_approximation(*data()), data(), {}


@program()
def auto_delta() -> Pair:
    return regression, AutoDelta(regression), data(), {}


@program()
def auto_guide_list() -> Pair:
    guide = AutoGuideList(by_groups)
    guide.append(AutoDelta(poutine.block(by_groups, expose=["center", "spread"])))
    guide.append(AutoDiagonalNormal(poutine.block(by_groups, expose=["slope", "error"])))
    return by_groups, guide, data(), {}


@program(enumerated=True, elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1))
def auto_discrete_parallel() -> Pair:
    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            is_outlier = pyro.sample("is_outlier", dist.Bernoulli(0.1))
            pyro.sample("obs", dist.Normal(slope * x, 0.2 + 2 * is_outlier), obs=y)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["is_outlier"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["is_outlier"])))
    return model, guide, data(), {}


@program()
def auto_structured() -> Pair:
    guide = AutoStructured(
        by_groups,
        conditionals={"center": "normal", "spread": "delta", "slope": "mvn", "error": "normal"},
        dependencies={"slope": {"center": "linear"}},
    )
    return by_groups, guide, data(), {}


@program()
def auto_hierarchical_normal() -> Pair:
    return by_groups, AutoHierarchicalNormalMessenger(by_groups), data(), {}


@program()
def auto_normal_messenger() -> Pair:
    return by_groups, AutoNormalMessenger(by_groups), data(), {}


@program()
def auto_gaussian() -> Pair:
    # The class chooses a subclass by its backend, which makes it abstract to a type checker.
    guide: Any = AutoGaussian
    return by_groups, guide(by_groups, backend="dense"), data(), {}


class GroupGuide(EasyGuide):
    """A joint Normal of two sites, a point for a third, and a plate for the rest."""

    def guide(self, x: Tensor, y: Tensor) -> None:
        top = self.group(match="center|slope")
        size = top.event_shape.numel()
        loc = pyro.param("top_loc", torch.zeros(size))
        top.sample("top", dist.Normal(loc, 0.3).to_event(1))
        self.map_estimate("spread")
        locs = pyro.param("error_locs", torch.zeros(len(x)))
        with self.plate("data", len(x)):
            pyro.sample("error", dist.Normal(locs, 0.3))


@program()
def easy_guide() -> Pair:
    return by_groups, GroupGuide(by_groups), data(), {}
