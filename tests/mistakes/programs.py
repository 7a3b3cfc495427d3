"""Small programs with which the mistakes are made."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from pyro_ext.infer import (
    ImportanceWeightedELBO,
)

N = 20
X = torch.linspace(-2, 2, N)
MASK = torch.arange(N) < 15
ITEMS = torch.arange(5).repeat(4)
ELBO_3 = ImportanceWeightedELBO(3)


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(1.0))))


def global_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def global_guide(x: Tensor) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))


def both_model(x: Tensor, **plate: Any) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", **(plate or {"size": len(x)})):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def both_guide(x: Tensor, **plate: Any) -> None:
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", **(plate or {"size": len(x)})):
        pyro.sample("z", dist.Normal(x / 2, 1.0))


def minibatch_model(x: Tensor) -> None:
    both_model(x, size=5 * N, subsample_size=len(x))


def rows_model(x: Tensor) -> None:
    both_model(x, size=5 * N, subsample=x)


def rows_guide(x: Tensor) -> None:
    both_guide(x, size=5 * N, subsample=x)


def sequential_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(x), subsample_size=4):
        pyro.sample(f"x_{i}", dist.Normal(loc, 1.0), obs=x[i])


def indexing_model(x: Tensor) -> None:
    with pyro.plate("items", 5):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N):
        pyro.sample("x", dist.Normal(a[ITEMS], 1.0), obs=x)


def mixing_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(0), 1.0), obs=x)


def masked_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=MASK):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(N)), 1.0))


def imputing_model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x, obs_mask=MASK)


def discrete_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def discrete_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(N))))


def unbounded_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(-3.0, pyro.param("top", torch.tensor(3.0))))


def flow_guide(x: Tensor) -> None:
    flow = pyro.module("flow", dist.transforms.planar(1))
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def vector_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def narrow_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(50.0, 51.0))


def plain_guide(x: Tensor) -> None:
    """The guide of local_model without its plate."""
    pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))


def factor_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -z.square())


def svi(
    elbo: Any = ELBO_3, model: Any = local_model, guide: Any = local_guide, cls: Any = SVI
) -> Any:
    return cls(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)


def fitted(model: Any, make: Any, x: Tensor) -> Any:
    guide = make(model)
    guide(x)
    return guide


def with_nan(at: int) -> Tensor:
    x = X.clone()
    x[at] = torch.nan
    return x


def support_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(-5.0, 5.0, validate_args=False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_on(x: Tensor, **plate: Any) -> None:
    with pyro.plate("data", **plate):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_on(x: Tensor) -> None:
    with pyro.plate("data"):
        pyro.sample("z", dist.Normal(x, 1.0))
