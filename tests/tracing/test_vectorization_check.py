from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from torch import nn

from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence
from tests.models import NormalNormal


def programs_with(net):
    """A latent vector decoded by ``net`` for each of three data points."""

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=torch.zeros(3, 4))

    def guide():
        with pyro.plate("data", 3, subsample_size=3):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    return model, guide


class Mixing(nn.Module):
    """Standardises over all leading dims, the particle dim included."""

    def forward(self, z):
        return (z - z.mean(tuple(range(z.dim() - 1)))) / z.std(tuple(range(z.dim() - 1)))


def test_accepts_programs_that_keep_particles_apart():
    ImportanceWeightedELBO(4).check(*programs_with(nn.Linear(4, 4)))
    subsampled = NormalNormal(torch.randn(6), subsample_size=2)
    ImportanceWeightedELBO(4).check(subsampled.model, subsampled.guide)


@pytest.mark.parametrize("net", [Mixing(), nn.Dropout(0.5)], ids=["mixing", "dropout"])
def test_finds_programs_that_do_not(net):
    model, guide = programs_with(net)
    with pytest.raises(ValueError, match="Site 'x' of the model has another log-probability"):
        ImportanceWeightedELBO(4).check(model, guide)
    ImportanceWeightedELBO(4, vectorize_particles=False).check(model, guide)
    ImportanceWeightedELBO(1).check(model, guide)
    if isinstance(net, nn.Dropout):
        ImportanceWeightedELBO(4).check(*programs_with(net.eval()))


def test_leaves_no_trace_in_the_surrounding_handlers():
    model, guide = programs_with(nn.Linear(4, 4))
    with pyro.poutine.trace() as tracer:
        ImportanceWeightedELBO(4, max_plate_nesting=1).check(model, guide)
    assert not tracer.trace.nodes


def test_a_site_that_lost_its_filler_dim_is_refused_by_name():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu.squeeze(), 1.0), obs=torch.tensor(2.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(3))

    def guide():
        pyro.sample("mu", dist.Normal(0.4, 0.45))

    elbo = ImportanceWeightedELBO(5)
    message = r"Site 'y' of the model has a log-probability of shape \(5, 5\)"
    for call in (elbo.loss, elbo.check, partial(estimate_evidence, num_samples=5)):
        with pytest.raises(ValueError, match=message):
            call(model, guide)


def test_a_messenger_guide_is_refused():
    def model():
        pyro.sample(
            "x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.ones(())
        )

    with pytest.raises(NotImplementedError, match="GuideMessenger"):
        ImportanceWeightedELBO(3).check(model, autoguide.AutoNormalMessenger(model))
