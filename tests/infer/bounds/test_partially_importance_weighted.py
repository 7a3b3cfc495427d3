"""PartiallyImportanceWeightedELBO trains the model by one bound and the guide by another."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    MultiplyImportanceWeightedELBO,
    PartiallyImportanceWeightedELBO,
)
from tests.infer.gradients.estimates import F64, gradient
from tests.registry import VECTORIZE


@VECTORIZE
@pytest.mark.parametrize("rule", ["pathwise", "stl", "dreg"])
def test_piwae_trains_the_model_by_one_bound_and_the_guide_by_another(rule, vectorize):
    x = torch.tensor([0.5, -1.0], **F64)
    weight = torch.tensor(0.8, **F64, requires_grad=True)
    slope, logit = (torch.tensor(v, **F64, requires_grad=True) for v in (0.3, 0.2))

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            d = pyro.sample("d", dist.Bernoulli(x.new_tensor(0.4)))
            pyro.sample("x", dist.Normal(weight * z + d, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(slope * x, 1.0))
            pyro.sample("d", dist.Bernoulli(logits=logit + z))

    options = {"gradient": rule, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    parameters = [weight, slope, logit]
    found = gradient(PartiallyImportanceWeightedELBO(6, 3, **options), model, guide, parameters, 0)
    of_model = gradient(ImportanceWeightedELBO(6, **options), model, guide, parameters, 0)
    elbo = MultiplyImportanceWeightedELBO(6, 3, **options)
    of_guide = gradient(elbo, model, guide, parameters, 0)
    torch.testing.assert_close(found, torch.cat([of_model[:1], of_guide[1:]]))
    assert not torch.allclose(of_model, of_guide)


def test_piwae_takes_a_guide_of_discrete_sites_alone():
    logit = torch.tensor(0.4, **F64, requires_grad=True)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logit))

    def model():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, **F64)))

    found = [
        gradient(cls(4, 2, max_plate_nesting=0), model, guide, [logit], 0)
        for cls in (PartiallyImportanceWeightedELBO, MultiplyImportanceWeightedELBO)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [None, 4])
def test_a_group_of_zero_weights_is_refused_for_the_guide(size):
    a = torch.tensor(0.3, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        particle = torch.arange(z.numel()).reshape(z.shape)
        pyro.factor("cut", torch.where(particle < 2, -math.inf, 0.0) + 0 * z)

    def guide():
        pyro.sample("z", dist.Normal(a, 1.0))

    elbo = PartiallyImportanceWeightedELBO(8, 4, particle_chunk_size=size, max_plate_nesting=0)
    with pytest.raises(ValueError, match="site 'cut' of the model is infinite"):
        elbo.loss_and_grads(model, guide)
    assert a.grad is None
