"""Models with marked discrete sites, and their exact results from a grid over two means."""

import math
from itertools import product

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate

from tests.tracing.enumerated import PROBS, TRANSITIONS, X

F64 = torch.float64
PRIOR = dist.Normal(torch.tensor([-1.0, 1.0], dtype=F64), 1.0)
NOISE = 0.8
#: It has wider tails than the posterior, so that the weights have a variance.
PROPOSAL = dist.Normal(torch.tensor([-0.7, 1.2], dtype=F64), 1.1)


def chosen(means, index):
    """Return the mean of each index, with particles to the left of the plates of the index."""
    return torch.where(index == 1, means[..., 1], means[..., 0])


@config_enumerate
def mixture(x, noise=NOISE):
    means = pyro.sample("means", PRIOR.to_event(1))
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(PROBS))
        loc = pyro.deterministic("loc", chosen(means, a))
        pyro.sample("x", dist.Normal(loc, noise), obs=x)
    return a.double().sum(-1)


@config_enumerate
def hmm(x):
    means = pyro.sample("means", PRIOR.to_event(1))
    z, total = torch.tensor(0), torch.zeros(())
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
        pyro.sample(f"x_{t}", dist.Normal(chosen(means, z), NOISE), obs=x[t])
        total = total + z.double()
    return total


@config_enumerate
def rows(x):
    with pyro.plate("data", len(X), subsample_size=len(x)) as index:
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        a = pyro.sample("a", dist.Categorical(PROBS))
        x = x[index] if len(x) == len(X) else x
        pyro.sample("x", dist.Normal(z + 2.0 * a, 0.5), obs=x)


def guide(*_):
    pyro.sample("means", PROPOSAL.to_event(1))


def guide_of_rows(x):
    with pyro.plate("data", len(X), subsample_size=len(x)):
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.2))


PATHS = torch.tensor(list(product([0, 1], repeat=len(X))))


def log_rows(means):
    """log p(x_n, a_n | means), of shape (..., data, 2)."""
    return dist.Normal(means.unsqueeze(-2), NOISE).log_prob(X.unsqueeze(-1)) + PROBS.log()


def log_paths(means):
    """log p(x, z | means) of each path of states, of shape (..., 32)."""
    before = torch.cat([torch.zeros(len(PATHS), 1).long(), PATHS[:, :-1]], 1)
    prior = TRANSITIONS[before, PATHS].log().sum(-1)
    found = dist.Normal(means[..., PATHS], NOISE).log_prob(X).sum(-1)
    return found + prior


def grid(size=300, half_width=7.0):
    """Points (size^2, 2) over both means, and log p(means) + log area."""
    line = torch.linspace(-half_width, half_width, size, dtype=F64)
    points = torch.cartesian_prod(line, line)
    area = 2 * math.log(2 * half_width / (size - 1))
    return points, PRIOR.log_prob(points).sum(-1) + area


def log_joint(name, points):
    """log p(x | means) of a model by enumeration."""
    if name == "mixture":
        return log_rows(points).logsumexp(-1).sum(-1)
    return log_paths(points).logsumexp(-1)


def posterior(name):
    """Points, and their posterior probabilities."""
    points, log_prior = grid()
    return points, (log_prior + log_joint(name, points)).softmax(0)


def log_evidence(name):
    points, log_prior = grid()
    return (log_prior + log_joint(name, points)).logsumexp(0)


MODELS = {"mixture": mixture, "hmm": hmm}


def exact_discrete(name):
    """P(site = 1 | x) of the discrete sites, of shape (data,)."""
    points, weight = posterior(name)
    if name == "mixture":
        return (weight[:, None] * log_rows(points).softmax(-1)[..., 1]).sum(0)
    return weight @ log_paths(points).softmax(-1) @ PATHS.double()
