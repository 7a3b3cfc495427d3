"""Neal's funnel: nine normals whose scale is itself unknown."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.tracing import Program
from tests.posteriors.posterior import Posterior, posterior

NUM_SCALED = 9
NOISE = 1.0
Y = torch.tensor([1.9, -0.6, 2.7, -3.1, 0.4, 1.2, -1.8, -0.3, 2.2], dtype=torch.float64)


def model(loc: Tensor) -> Tensor:
    """x ~ N(loc, exp(v / 2)), v ~ N(0, 3)."""
    v = pyro.sample("v", dist.Normal(loc.new_zeros(()), 3.0))
    scale = (v / 2).exp().unsqueeze(-1)
    return pyro.sample("x", dist.Normal(loc, scale).to_event(1))


def observed_model(y: Tensor) -> None:
    """y ~ N(x, NOISE), with x from the funnel."""
    x = model(torch.zeros_like(y))
    pyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=y)


def wide(model: Program) -> Program:
    """Return a guide with N(0, 3) for all ten coordinates."""

    def guide(loc: Tensor) -> None:
        pyro.sample("v", dist.Normal(loc.new_zeros(()), 3.0))
        pyro.sample("x", dist.Normal(torch.zeros_like(loc), 3.0).to_event(1))

    return guide


def log_evidence_given(v: Tensor, y: Tensor) -> Tensor:
    """Return log p(y | v), where y is normal."""
    scale = (v.exp() + NOISE**2).sqrt().unsqueeze(-1)
    return dist.Normal(torch.zeros_like(y), scale).log_prob(y).sum(-1)


def observed_log_evidence(num_nodes: int = 2000) -> float:
    """Return the log evidence of the data, by the trapezoidal rule over v."""
    v = torch.linspace(-36.0, 36.0, num_nodes, dtype=torch.float64)
    log_p = dist.Normal(torch.zeros_like(v), 3.0).log_prob(v) + log_evidence_given(v, Y)
    return (log_p.logsumexp(0) + (v[1] - v[0]).log()).item()


@posterior
def funnel() -> Posterior:
    """Without data: the evidence is 1. A sampler from the prior has nothing to do."""
    loc = torch.zeros(NUM_SCALED, dtype=torch.float64)
    return Posterior(model, (loc,), 0.0, guides={"wide": wide}, start="wide")


@posterior
def funnel_observed() -> Posterior:
    """With data."""
    return Posterior(observed_model, (Y,), observed_log_evidence(), guides={"wide": wide})
