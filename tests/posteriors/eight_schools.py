"""Eight schools (Rubin 1981), in two parameterisations of the same model."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from tests.posteriors.posterior import Posterior, posterior

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=torch.float64)
GUIDES = {"mean-field": AutoDiagonalNormal, "full-rank": AutoMultivariateNormal}


def centered(sigma: Tensor, y: Tensor) -> None:
    """y ~ N(theta, sigma), theta ~ N(mu, tau)."""
    mu = pyro.sample("mu", dist.Normal(sigma.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_full((), 5.0)))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


non_centered = poutine.reparam(centered, {"theta": LocScaleReparam(0.0)})


def log_evidence_given(tau: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """Return log p(y | tau): mu and theta are normal.

    :param tau: the spread of the schools, of shape ``(...)``.
    """
    variances = (sigma.square() + tau.unsqueeze(-1).square()).diag_embed()
    return dist.MultivariateNormal(torch.zeros_like(y), variances + 25.0).log_prob(y)


def log_evidence(num_nodes: int = 200) -> float:
    """Return the log evidence, by Gauss-Legendre quadrature over the quantiles of tau."""
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(num_nodes))
    tau = 5 * (math.pi / 4 * (nodes + 1)).tan()
    return ((weights / 2).log() + log_evidence_given(tau, SIGMA, Y)).logsumexp(0).item()


@posterior
def eight_schools_centered() -> Posterior:
    """With theta as the latent site: a funnel."""
    return Posterior(centered, (SIGMA, Y), log_evidence(), guides=GUIDES)


@posterior
def eight_schools_noncentered() -> Posterior:
    """With the standardised theta as the latent site."""
    return Posterior(non_centered, (SIGMA, Y), log_evidence(), guides=GUIDES)
