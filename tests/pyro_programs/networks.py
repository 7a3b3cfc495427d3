"""Bayesian neural networks with priors on their weights."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from tests.pyro_programs.program import Pair, program

#: A linear layer whose weights may be sites.
linear: Any = PyroModule[nn.Linear]


def prior(*shape: int) -> Any:
    return PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))


class Network(PyroModule):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = linear(1, hidden)
        self.first.weight, self.first.bias = prior(hidden, 1), prior(hidden)
        self.last = linear(hidden, 1)
        self.last.weight, self.last.bias = prior(1, hidden), prior(1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        sigma = pyro.sample("sigma", dist.Gamma(0.5, 1.0))
        mean = self.last(torch.tanh(self.first(x.reshape(-1, 1)))).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, 0.1 + sigma), obs=y)
        return mean


def data() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1.0, 1.0, 6)
    return x, x.sin()


@program(one_at_a_time=True)
def bayesian_network() -> Pair:
    model = Network(4)
    return model, AutoNormal(model), data(), {}


class Regression(PyroModule):
    """A linear regression whose mean has one dim too many with several particles."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = prior(3), PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = (x * self.weight.unsqueeze(-2)).sum(-1) + self.bias
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)


@program(one_at_a_time=True)
def module_regression() -> Pair:
    model = Regression()
    return model, AutoDiagonalNormal(model), (torch.randn(5, 3), torch.randn(5)), {}
