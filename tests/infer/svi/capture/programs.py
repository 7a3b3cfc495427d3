"""Parts of models, a guide, and an SVI whose steps change nothing and follow the programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO

X = torch.tensor(2.0)


def guide(x):
    return pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.8))


def observe(z, x, scale=1.0):
    pyro.sample("x", dist.Normal(z, scale), obs=x)


def still(model, guide=guide, num_particles=3, **options):
    loss = ImportanceWeightedELBO(num_particles, max_plate_nesting=0)
    return CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss, backend="eager", **options)


def assert_follows(svi, *args):
    state = pyro.util.get_rng_state()
    expected = svi.objective.loss(svi.model, svi.guide, *args)
    pyro.util.set_rng_state(state)
    assert svi.step(*args) == pytest.approx(expected, rel=1e-6)


def take_steps(svi, batches):
    for x in batches:
        assert_follows(svi, x)
