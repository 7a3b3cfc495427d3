"""A posterior with two modes of unequal mass, far from each other."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ext.tracing import Program
from tests.posteriors.posterior import POSTERIORS, Posterior

PRIOR_SCALE = 3.0
NOISE = 0.5
#: A mode of the likelihood in all coordinates, and its probability.
MODES = ((-2.0, 0.7), (1.5, 0.3))


def model(x: Tensor) -> None:
    """x ~ a mixture of N(z - m, NOISE) over the modes m, z ~ N(0, PRIOR_SCALE)."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), PRIOR_SCALE).to_event(1))
    locs, probs = map(x.new_tensor, zip(*MODES, strict=True))
    components = dist.Normal(z.unsqueeze(-2) - locs.unsqueeze(-1), NOISE).to_event(1)
    mixture = dist.MixtureSameFamily(dist.Categorical(probs.expand((*z.shape[:-1], 2))), components)
    pyro.sample("x", mixture, obs=x)


def one_mode(model: Program) -> Program:
    """Return a guide that covers the second mode alone."""
    shrinkage = PRIOR_SCALE**2 / (PRIOR_SCALE**2 + NOISE**2)

    def guide(x: Tensor) -> None:
        loc = torch.full_like(x, MODES[1][0] * shrinkage)
        pyro.sample("z", dist.Normal(loc, 1.1 * NOISE).to_event(1))

    return guide


def log_masses(num_dims: int) -> Tensor:
    """Return the log evidence of each component, with its probability."""
    scale = math.hypot(PRIOR_SCALE, NOISE)
    locs, probs = (torch.tensor(x, dtype=torch.float64) for x in zip(*MODES, strict=True))
    return probs.log() + num_dims * dist.Normal(locs, scale).log_prob(torch.zeros_like(locs))


def two_modes(num_dims: int) -> Posterior:
    """The posterior in some dimensions."""
    x = torch.zeros(num_dims, dtype=torch.float64)
    log_evidence = log_masses(num_dims).logsumexp(0).item()
    return Posterior(model, (x,), log_evidence, guides={"one mode": one_mode})


for _num_dims in (2, 20):
    POSTERIORS[f"two_modes_{_num_dims}"] = lambda num_dims=_num_dims: two_modes(num_dims)
