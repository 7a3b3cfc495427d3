"""Plates, masks, scales and effect handlers of every kind."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from tests.pyro_programs.program import Pair, masked, program

DATA = torch.tensor([0.3, 1.1, 0.7, 1.4, 0.2])


@program()
def normal_normal() -> Pair:
    """The example of minipyro: one latent, and a plate of data."""

    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), dim=-1):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)

    def guide(data: Tensor) -> None:
        guide_loc = pyro.param("guide_loc", torch.tensor(0.0))
        guide_scale = pyro.param("guide_scale_log", torch.tensor(0.0)).exp()
        pyro.sample("loc", dist.Normal(guide_loc, guide_scale))

    return model, guide, (DATA,), {}


@program()
def sequential_plate() -> Pair:
    """The coin of the introduction: a site for each toss."""

    def model(data: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        for i in map(int, pyro.plate("tosses", len(data))):
            pyro.sample(f"obs_{i}", dist.Bernoulli(fairness), obs=data[i])

    def guide(data: Tensor) -> None:
        positive = dist.constraints.positive
        alpha = pyro.param("alpha", torch.tensor(15.0), constraint=positive)
        beta = pyro.param("beta", torch.tensor(15.0), constraint=positive)
        pyro.sample("fairness", dist.Beta(alpha, beta))

    return model, guide, (DATA.round().clamp(0, 1),), {}


@program()
def subsampled_globals() -> Pair:
    """One latent for all data, and a minibatch that the plate draws."""

    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), subsample_size=2) as rows:
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data[rows])

    return model, AutoNormal(model), (DATA,), {}


@program()
def subsampled_locals() -> Pair:
    """Global and local latents, with ``create_plates`` for the minibatch."""

    def plate(data: Tensor) -> pyro.plate:
        return pyro.plate("data", len(data), subsample_size=2, dim=-1)

    def model(data: Tensor) -> None:
        center = pyro.sample("center", dist.Normal(0.0, 1.0))
        with plate(data):
            batch = pyro.subsample(data, event_dim=0)
            z = pyro.sample("z", dist.Normal(center, 1.0))
            pyro.sample("obs", dist.Normal(z, 0.5), obs=batch)

    return model, AutoNormal(model, create_plates=plate), (DATA,), {}


@program()
def nested_plates() -> Pair:
    """Effects of rows and of columns, whose plates cross, and a third plate for a minibatch."""

    def model(data: Tensor) -> None:
        rows = pyro.plate("rows", data.shape[1], dim=-2)
        columns = pyro.plate("columns", data.shape[2], dim=-1)
        with rows:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with columns:
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("layers", data.shape[0], dim=-3), rows, columns:
            c = pyro.sample("c", dist.Normal(a + b, 0.5))
            pyro.sample("obs", dist.Normal(c, 0.5), obs=data)

    return model, AutoNormal(model), (torch.randn(2, 3, 4),), {}


@program()
def ragged_plates() -> Pair:
    """Groups of different sizes: a plate of its own for each, and one for the long format."""
    groups = torch.tensor([0, 0, 1, 2, 2])

    def model(data: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-1):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for g in range(3):
            with pyro.plate(f"group_{g}", int((groups == g).sum()), dim=-1):
                z = pyro.sample(f"z_{g}", dist.Normal(loc[..., g : g + 1], 0.5))
                pyro.sample(f"obs_{g}", dist.Normal(z, 0.5), obs=data[groups == g])
        with pyro.plate("data", len(data), dim=-1):
            pyro.sample("obs", dist.Normal(loc[..., groups], 1.0), obs=data)

    return model, AutoNormal(model), (DATA,), {}


@program(enumerated=True, elbo=lambda: TraceEnum_ELBO(max_plate_nesting=2))
def plate_contraction() -> Pair:
    """Discrete factors over two plates, which the ELBO contracts like ``pyro.ops.einsum``."""

    def model() -> None:
        simplex = dist.constraints.simplex
        prior = pyro.param("prior", torch.ones(2) / 2, constraint=simplex)
        table = pyro.param("table", torch.rand(2, 2, 3), constraint=simplex)
        infer: Any = {"enumerate": "parallel"}
        with pyro.plate("i", 2, dim=-2):
            x = pyro.sample("x", dist.Categorical(prior), infer=infer)
            with pyro.plate("j", 3, dim=-1):
                y = pyro.sample("y", dist.Categorical(prior), infer=infer)
                fn = dist.Categorical(pyro.ops.indexing.Vindex(table)[x, y])
                pyro.sample("obs", fn, obs=torch.tensor([[0, 1, 2], [2, 2, 1]]))

    return model, lambda: None, (), {}


@program()
def missing_data() -> Pair:
    """Missing values are drawn, because of ``obs_mask``."""
    is_observed: Any = torch.tensor([True, False, True, True, False])

    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(loc, 0.5), obs=data, obs_mask=is_observed)

    def guide(data: Tensor) -> None:
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.3))
        locs = pyro.param("locs", torch.zeros(len(data)))
        with pyro.plate("data", len(data)):
            pyro.sample("obs_unobserved", dist.Normal(locs, 0.5))

    return model, guide, (DATA,), {}


@program()
def masks_and_scales() -> Pair:
    """An annealed prior, weights of data points, and data points that are masked out."""
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0])
    is_valid = torch.tensor([True, True, False, True, True])

    def model(data: Tensor) -> None:
        with poutine.scale(scale=0.3):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)), masked(is_valid):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            with poutine.scale(scale=weights):
                pyro.sample("obs", dist.Normal(z, 0.5), obs=data)

    def guide(data: Tensor) -> None:
        with poutine.scale(scale=0.3):
            pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.0)), 0.3))
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(data)), masked(is_valid):
            pyro.sample("z", dist.Normal(slope * data, 0.5))

    return model, guide, (DATA,), {}


@program()
def soft_constraint() -> Pair:
    """A factor ties two latents, and a deterministic site records their sum."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        total = pyro.deterministic("total", a + b)
        pyro.factor("near_one", -10 * (total - 1) ** 2)

    return model, AutoNormal(model), (), {}


@program()
def factor_in_guide() -> Pair:
    """A guide whose draws come from a base that is not a site of the model."""

    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(z, 0.5), obs=data)

    def guide(data: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        base = pyro.sample("base", dist.Normal(loc, 0.3), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(base.exp(), log_density=-base))

    return model, guide, (DATA,), {}


def causes(data: Tensor) -> None:
    confounder = pyro.sample("confounder", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        treatment = pyro.sample("treatment", dist.Normal(confounder, 1.0))
        pyro.sample("outcome", dist.Normal(treatment - confounder, 0.5))


@program()
def conditioned() -> Pair:
    model = poutine.condition(causes, {"outcome": DATA})
    return model, AutoNormal(model), (DATA,), {}


@program()
def intervened() -> Pair:
    """An intervention fixes the treatment. Its value is no longer a site with a density."""
    observed = poutine.condition(causes, {"outcome": DATA})
    model = poutine.do(observed, {"treatment": torch.ones(5)})
    return model, AutoNormal(model), (DATA,), {}


@program()
def lifted_parameters() -> Pair:
    """Priors in place of parameters, with points as a guide."""

    def likelihood(data: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(data)):
            pyro.sample("obs", dist.Normal(loc, 0.5), obs=data)

    model = poutine.lift(likelihood, {"loc": dist.Normal(0.0, 1.0)})
    return model, AutoDelta(model), (DATA,), {}
