"""Linear regression with a normal prior and a correlated design."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from tests.posteriors.posterior import POSTERIORS, Posterior

NOISE = 0.5
#: The correlation of neighbouring columns of the design.
CORRELATION = 0.9
#: number of weights -> number of data
SIZES = {1: 20, 10: 40, 50: 100}


def model(design: Tensor, y: Tensor) -> None:
    """y ~ N(design w, NOISE), w ~ N(0, 1)."""
    w = pyro.sample("w", dist.Normal(design.new_zeros(design.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w @ design.T, NOISE).to_event(1), obs=y)


def data(num_weights: int) -> tuple[Tensor, Tensor]:
    """Return a design and observations, the same at each call."""
    random = np.random.RandomState(num_weights)
    lags = np.abs(np.subtract.outer(np.arange(num_weights), np.arange(num_weights)))
    root = np.linalg.cholesky(CORRELATION**lags)
    design = random.normal(size=(SIZES[num_weights], num_weights)) @ root.T
    y = design @ random.normal(size=num_weights) + NOISE * random.normal(size=len(design))
    return torch.tensor(design), torch.tensor(y)


def regression(num_weights: int) -> Posterior:
    """The posterior of some weights."""
    design, y = data(num_weights)
    covariance = design @ design.T + NOISE**2 * torch.eye(len(y), dtype=y.dtype)
    log_evidence = dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()
    return Posterior(model, (design, y), log_evidence, guides={"full-rank": AutoMultivariateNormal})


for _size in SIZES:
    POSTERIORS[f"regression_{_size}"] = lambda size=_size: regression(size)
