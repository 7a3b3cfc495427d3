"""Structures of sites that Trace_ELBO takes."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LatentStableReparam
from pyro.ops.indexing import Vindex

from tests.tracing.structures.registry import structure


@structure()
def nothing():
    return (lambda: None), (lambda: None)


@structure()
def data_only():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.zeros(2))

    return model, lambda: None


@structure((True,), (False,))
def with_or_without_rsample(has_rsample):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.clamp(0.0, 0.1), 1.0), obs=torch.tensor(0.0))

    def guide():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 1.0).has_rsample_(has_rsample))

    return model, guide


def normal_guide():
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


@structure((True,), (False,), (torch.tensor(True),), (torch.tensor(False),))
def masked_data(mask):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return model, normal_guide


@structure((1,), (0.1,), (torch.tensor(0.5),))
def scaled_data(scale):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=scale):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return model, normal_guide


@structure(
    ({"mask": True},),
    ({"mask": False},),
    ({"mask": torch.tensor([False, True])},),
    ({"scale": 0.1},),
    ({"scale": torch.tensor([0.1, 0.9])},),
)
def masked_or_scaled_plate_of_event_data(kwargs):
    handler = poutine.mask if "mask" in kwargs else poutine.scale
    data = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])

    def model():
        c = pyro.sample("c", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        with pyro.plate("data", 2), handler(**kwargs):
            pyro.sample("x", dist.Dirichlet(c), obs=data)

    def guide():
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("c", dist.LogNormal(loc, 1.0).to_event(1))

    return model, guide


@structure()
def reparameterized_stable_with_deltas():
    @poutine.reparam(config={"z": LatentStableReparam()})
    def model():
        stability = pyro.sample("stability", dist.Uniform(0.0, 2.0))
        z = pyro.sample("z", dist.Stable(stability, 0.1))
        pyro.sample("x", dist.Poisson(z.abs()), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("stability", dist.Delta(torch.tensor(1.5)))
        pyro.sample("z_uniform", dist.Delta(torch.tensor(0.1)))
        pyro.sample("z_exponential", dist.Delta(torch.tensor(1.0)))

    return model, guide


@structure()
def discrete_index_into_parameters():
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])

    def model():
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Categorical(Vindex(weights)[k]), obs=torch.tensor([0, 1, 1, 0]))

    def guide():
        logits = pyro.param("logits", torch.zeros(4, 3))
        with pyro.plate("data", 4):
            pyro.sample("k", dist.Categorical(logits=logits))

    return model, guide
