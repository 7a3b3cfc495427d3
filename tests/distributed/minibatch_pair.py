"""Modules that processes train in a loop of their own, with the draws of one process."""

import warnings

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import distributed, nn

from pyro_ext.distributed import DistributedNoise
from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO

NUM_DATA, BATCH_SIZE, NUM_PARTICLES = 40, 8, 5
OPTIONS = {"max_plate_nesting": 1}
OBJECTIVES = {
    "pathwise": ImportanceWeightedELBO(NUM_PARTICLES, **OPTIONS),
    "dreg": ImportanceWeightedELBO(NUM_PARTICLES, gradient="dreg", **OPTIONS),
    "jackknife": JackknifeELBO(NUM_PARTICLES, order=1, **OPTIONS),
    "local plate": ImportanceWeightedELBO(NUM_PARTICLES, local_plate="data", **OPTIONS),
}


class Model(PyroModule):
    def __init__(self, has_global):
        super().__init__()
        self.has_global = has_global
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
        self.scale = PyroParam(torch.ones(3), dist.constraints.positive)

    def forward(self, x):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.has_global else x.new_zeros(())
        with pyro.plate("data", NUM_DATA, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + shift.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, has_global):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.loc = nn.Parameter(torch.tensor([0.5]), requires_grad=has_global)
        self.has_global = has_global

    def forward(self, x):
        pyro.module("encoder", self.encoder)
        if self.has_global:
            pyro.sample("shift", dist.Normal(self.loc[0], 0.3))
        with pyro.plate("data", NUM_DATA, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Regression(PyroModule):
    """A model with a global latent and, perhaps, statistics of minibatches."""

    def __init__(self, has_norm):
        super().__init__()
        self.scale = PyroParam(torch.ones(1), dist.constraints.positive)
        self.norm = nn.BatchNorm1d(3, affine=False) if has_norm else nn.Identity()

    def forward(self, x):
        weights = pyro.sample("weights", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        self.norm(x)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(x @ weights, self.scale), obs=x.sum(-1))


def module_of(name, wrap=lambda elbo: elbo):
    """Return the module form of an objective, with the same parameters in each call."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    has_global = name == "local plate"
    return wrap(OBJECTIVES[name])(Model(has_global), Guide(has_global))


def share_of(step):
    """Return the share of this process of a minibatch, as a DistributedSampler divides it."""
    x = torch.randn(BATCH_SIZE, 3, generator=torch.Generator().manual_seed(step))
    is_alone = not distributed.is_initialized()
    rank, size = (0, 1) if is_alone else (distributed.get_rank(), distributed.get_world_size())
    return x[rank::size]


def train(module, optimizer, steps):
    noise = DistributedNoise("data", seed=0, per_row=True)
    with warnings.catch_warnings():
        # Linear layers return views, which the programs do not change in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        for step in steps:
            optimizer.zero_grad()
            noise.step = step
            with noise:
                module(share_of(step)).backward()
            optimizer.step()


def assert_all_close(found, expected):
    for values in found:
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
