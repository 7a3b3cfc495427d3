"""MeanFieldGuide begins where it is told, and trains."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_ext.nn import BayesianModule, MeanFieldGuide
from tests.nn.networks import NETS, NORMAL, Classifier, data, draw, run


def test_mean_field_guide_begins_where_it_is_told():
    net = nn.Linear(3, 2)
    module = BayesianModule(net, NORMAL)
    own = MeanFieldGuide(module, init_scale=1e-3).distributions()
    torch.testing.assert_close(own["weight"].base_dist.loc, net.weight)
    torch.testing.assert_close(own["bias"].base_dist.scale, torch.full((2,), 1e-3))
    zero = MeanFieldGuide(module, init_loc=lambda name, value: torch.zeros_like(value))
    assert not zero.distributions()["weight"].base_dist.loc.any()


def test_mean_field_guide_on_constrained_supports():
    def prior(name, parameter):
        return dist.LogNormal(0.0, 0.5) if name == "1.weight" else NORMAL

    module = BayesianModule(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), prior)
    guide = MeanFieldGuide(module, init_scale=0.5)
    posterior = guide.distributions()["1.weight"]
    draws = posterior.sample((1000,))
    assert (draws > 0).all()
    assert posterior.event_shape == (4,)
    torch.testing.assert_close(draws.log().mean(), torch.tensor(0.0), atol=0.05, rtol=0)
    model = Classifier(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), prior)
    x, y = data((5, 3))
    elbo = TraceMeanField_ELBO()
    assert elbo.differentiable_loss(model, MeanFieldGuide(model.net), x, y).isfinite()


@pytest.mark.long
@pytest.mark.parametrize("is_vectorized", [True, False])
@pytest.mark.parametrize("name", ["mlp", "convolution", "lstm"])
def test_training_decreases_the_loss(name, is_vectorized):
    make, shape, _ = NETS[name]
    model = Classifier(make())
    guide = MeanFieldGuide(model.net)
    x, y = data((40, *shape[1:]))
    elbo = Trace_ELBO(3, vectorize_particles=is_vectorized, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    losses = [svi.step(x, y) for _ in range(40)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", ["mlp", "convolution", "lstm"])
def test_predictive_in_parallel(name):
    make, shape, _ = NETS[name]
    model = Classifier(make())
    guide = MeanFieldGuide(model.net)
    x, _ = data(shape)
    for options in ({}, {"guide": guide}):
        samples = Predictive(model, num_samples=7, parallel=True, **options)(x)
        assert samples["y"].shape == (7, 5)
        one_by_one = Predictive(model, num_samples=7, **options)(x)
        assert {n: v.numel() for n, v in samples.items()} == {
            n: v.numel() for n, v in one_by_one.items()
        }


def test_copies_pickles_and_states():
    torch.manual_seed(1)
    module = BayesianModule(NETS["mlp"][0](), NORMAL)
    guide = MeanFieldGuide(module)
    x = torch.randn(5, 3)
    values = draw(module, (3, 1))
    expected = run(module, values, x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(run(twin, values, x), expected)
    other = BayesianModule(NETS["mlp"][0](), NORMAL)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other.value_of("0.weight"), module.value_of("0.weight"))
    twin = copy.deepcopy(guide)
    twin.load_state_dict(guide.state_dict())
    assert {n: v.shape for n, v in twin().items()} == {n: v.shape for n, v in guide().items()}
