"""A normal model and guide, and an SVI whose steps change nothing."""

import pyro
import pyro.distributions as dist
import torch

from pyro_ext.infer import CompiledSVI


def normal_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    pyro.sample("z", dist.Normal(loc, 0.8))


def eager_loss(svi, *args, **kwargs):
    """The loss of an eager step from the state of now."""
    svi.objective.loss(svi.model, svi.guide, *args, **kwargs)  # guesses the plates
    state = pyro.util.get_rng_state()
    loss = svi.objective.loss(svi.model, svi.guide, *args, **kwargs)
    pyro.util.set_rng_state(state)
    return loss


def still(model, guide, loss, **options):
    """An SVI whose steps change nothing."""
    return CompiledSVI(
        model, guide, pyro.optim.SGD({"lr": 0.0}), loss, backend="eager", fallback=False, **options
    )
