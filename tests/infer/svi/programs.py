"""Programs of many kinds, as tables of (model, guide, objective, arguments)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_ext.infer import ImportanceWeightedELBO, KLWeightedELBO, LinearKL
from pyro_ext.nn import BayesianModule, MeanFieldGuide


class Problem(NamedTuple):
    model: Callable[..., Any]
    guide: Callable[..., Any]
    loss: Any
    args: tuple[Any, ...]


class SmallVAE(nn.Module):
    """A VAE over binary pixels, with layers of choice in its encoder."""

    def __init__(self, *extra: nn.Module, num_pixels: int = 12) -> None:
        super().__init__()
        # A bias before BatchNorm would have a gradient of rounding errors alone.
        self.encoder = nn.Sequential(
            nn.Linear(num_pixels, 8, bias=False), *extra, nn.Tanh(), nn.Linear(8, 6)
        )
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, num_pixels))

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class TwoLayers(nn.Module):
    """Two stochastic layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(12, 8), nn.Linear(4, 4)])
        self.down = nn.ModuleList([nn.Linear(2, 8), nn.Linear(4, 12)])

    def model(self, x):
        pyro.module("two_layers", self)
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc, log_scale = self.down[0](top).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.down[1](z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.up[0](x).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.up[1](z).chunk(2, -1)
            pyro.sample("top", dist.Normal(loc, log_scale.exp()).to_event(1))


def images(batch_size=10):
    return (torch.rand(batch_size, 12, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def regression_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator)
    return x, x.sum(-1) + torch.randn(30, generator=generator)


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((weights * x).sum(-1), scale), obs=y)


def plain_regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, 1.0), obs=y)


def subsampled(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        pyro.sample("y", dist.Normal((weights * x[rows]).sum(-1), 1.0), obs=y[rows])


def subsampled_locals(x, y):
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + x[rows].sum(-1), 1.0), obs=y[rows])


def subsampled_locals_guide(x, y):
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("data", len(x), subsample_size=7) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 1.0))


def all_families(x, y):
    draws = [
        pyro.sample("gamma", dist.Gamma(2.0, 1.0)),
        pyro.sample("beta", dist.Beta(2.0, 1.0)),
        pyro.sample("categorical", dist.Categorical(torch.ones(3))),
        pyro.sample("poisson", dist.Poisson(3.0)),
        pyro.sample("bernoulli", dist.Bernoulli(0.3)),
        pyro.sample("student", dist.StudentT(3.0, 0.0, 1.0)),
        pyro.sample("laplace", dist.Laplace(0.0, 1.0)),
        pyro.sample("dirichlet", dist.Dirichlet(torch.ones(3)))[..., 0],
    ]
    pyro.sample("y", dist.Normal(sum(draws), 1.0), obs=y[0])


def all_families_guide(x, y):
    def parameter(name, value):
        return pyro.param(name, torch.tensor(value), constraint=dist.constraints.positive)

    pyro.sample("gamma", dist.Gamma(parameter("a", 2.0), 1.0))
    pyro.sample("beta", dist.Beta(parameter("b", 2.0), 1.0))
    pyro.sample("categorical", dist.Categorical(parameter("c", [1.0, 2.0, 3.0])))
    pyro.sample("poisson", dist.Poisson(parameter("d", 3.0)))
    pyro.sample("bernoulli", dist.Bernoulli(logits=parameter("e", 0.3)))
    pyro.sample("student", dist.StudentT(3.0, 0.0, parameter("f", 1.0)))
    pyro.sample("laplace", dist.Laplace(0.0, parameter("g", 1.0)))
    pyro.sample("dirichlet", dist.Dirichlet(parameter("h", [1.0, 1.0, 1.0])))


def bayesian_network(loss):
    network = BayesianModule(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), dist.Normal(0.0, 1.0)
    )
    network_guide = MeanFieldGuide(network)

    def model(x, y):
        out = network(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(out.squeeze(-1), 1.0), obs=y)

    def guide(x, y):
        return network_guide(x)

    return Problem(model, guide, loss, regression_data())


def vae(*extra, loss=None):
    module = SmallVAE(*extra)
    return Problem(module.model, module.guide, loss or ImportanceWeightedELBO(3), (images(),))


def two_layers():
    module = TwoLayers()
    return Problem(module.model, module.guide, ImportanceWeightedELBO(3), (images(),))


def regression_with(guide, loss, model=regression):
    return Problem(model, guide(model), loss, regression_data())


#: name -> a function that makes the problem
PROBLEMS = {
    "VAE": vae,
    "two stochastic layers": two_layers,
    "dropout": lambda: vae(nn.Dropout(0.3)),
    "BatchNorm": lambda: vae(nn.BatchNorm1d(8)),
    "spectral norm": lambda: vae(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
    "subsampled plate, globals": lambda: regression_with(AutoNormal, Trace_ELBO(), subsampled),
    "subsampled plate, locals": lambda: Problem(
        subsampled_locals,
        subsampled_locals_guide,
        ImportanceWeightedELBO(3, gradient="dreg"),
        regression_data(),
    ),
    "AutoNormal": lambda: regression_with(AutoNormal, Trace_ELBO(num_particles=2)),
    "AutoMultivariateNormal": lambda: regression_with(
        AutoMultivariateNormal,
        ImportanceWeightedELBO(3, vectorize_particles=False),
        plain_regression,
    ),
    "AutoLowRankMultivariateNormal": lambda: regression_with(
        lambda model: AutoLowRankMultivariateNormal(model, rank=1), Trace_ELBO()
    ),
    "mean field": lambda: regression_with(AutoNormal, TraceMeanField_ELBO()),
    "KL warm-up": lambda: regression_with(
        AutoNormal, KLWeightedELBO(TraceMeanField_ELBO(), LinearKL(8))
    ),
    "BayesianModule": lambda: bayesian_network(Trace_ELBO(num_particles=2)),
    "BayesianModule, vectorised": lambda: bayesian_network(ImportanceWeightedELBO(3)),
    "families": lambda: Problem(
        all_families, all_families_guide, ImportanceWeightedELBO(4), regression_data()
    ),
}
