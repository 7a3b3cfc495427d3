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


PLANAR = dist.transforms.Planar(1).double()
PLANAR.load_state_dict({name: torch.tensor([0.5]) for name in PLANAR.state_dict()})


def uniform_guide(parameter):
    return pyro.sample("z", dist.Uniform(0.0, parameter.exp()))


def planar_guide(parameter):
    base = dist.Normal(parameter.expand(1), 0.5).to_event(1)
    return pyro.sample("z", dist.TransformedDistribution(base, [PLANAR]))


def two_layer_guide(parameter):
    y = pyro.sample("y", dist.Normal(parameter, 1.0))
    return pyro.sample("z", dist.Delta(y.exp() + parameter))


@VECTORIZE
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("draw", [uniform_guide, planar_guide, two_layer_guide])
def test_pathwise_gradients_need_neither_an_inverse_nor_a_fixed_support(draw, chunk, vectorize):
    parameter, weight = (torch.tensor(v, **F64, requires_grad=True) for v in (0.3, 0.8))

    def model():
        if draw is two_layer_guide:
            pyro.sample("y", dist.Normal(weight.new_zeros(()), 1.0))
        prior = dist.Normal(weight.new_zeros(()), 1.0)
        z = pyro.sample("z", prior.expand([1]).to_event(1) if draw is planar_guide else prior)
        z = z[..., 0] if draw is planar_guide else z
        pyro.sample("x", dist.Normal(weight * z, 1.0), obs=weight.new_tensor(0.5))

    found = []
    for elbo in (
        PartiallyImportanceWeightedELBO(4, 2, vectorize_particles=vectorize, max_plate_nesting=0),
        ImportanceWeightedELBO(4, vectorize_particles=vectorize, max_plate_nesting=0),
        MultiplyImportanceWeightedELBO(4, 2, vectorize_particles=vectorize, max_plate_nesting=0),
    ):
        elbo.particle_chunk_size = chunk
        pyro.set_rng_seed(1)
        for p in (parameter, weight):
            p.grad = None
        elbo.loss_and_grads(model, lambda: draw(parameter))
        found.append((parameter.grad.clone(), weight.grad.clone()))
    piwae, of_model, of_guide = found
    torch.testing.assert_close(piwae, (of_guide[0], of_model[1]))
    assert not torch.allclose(of_model[0], of_guide[0])
