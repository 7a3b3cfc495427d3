"""Functions of torch that a capture replaces: items, one-hot vectors and integers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI
from pyro_ext.infer.svi.capture.replacements import get_item, one_hot

A, B = torch.tensor(1), torch.tensor(-1)
INDICES = [A, (A, B), (..., A), (slice(None), A), (A, ..., B), (0, A), (None, A, None, B)]
INDICES += [(0, ..., A), (A, slice(0, 2), B), (A, B, A, B), (0, ..., None, B, 1), (A, B, ...)]
INDICES += [(A, torch.tensor([0, 1])), (torch.tensor(True), A), (slice(0, 2), [0, 1], A)]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_items_are_those_of_torch(index):
    x = torch.randn(3, 4, 5, 2)
    torch.testing.assert_close(get_item(x, index), x[index], rtol=0, atol=0)


@pytest.mark.parametrize("num_classes", [-1, 3, 5])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_one_hot_is_that_of_torch(num_classes, shape):
    labels = torch.randint(3, shape)
    expected = nn.functional.one_hot(labels, num_classes)
    assert torch.equal(one_hot(labels, num_classes), expected)


def one_hot_latent(labels):
    probs = pyro.param("probs", torch.ones(3) / 3, constraint=dist.constraints.simplex)
    with pyro.plate("data", len(labels)):
        return pyro.sample("y", dist.OneHotCategorical(probs))


def one_hot_programs(labels):
    with pyro.plate("data", len(labels)):
        y = pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("seen", dist.OneHotCategorical(y * 0.5 + 0.1), obs=one_hot(labels, 3).float())


def scalar_latent(labels):
    logits = pyro.param("logits", torch.zeros(3))
    return pyro.sample("y", dist.Categorical(logits=logits))


def index_by_a_draw(labels):
    y = pyro.sample("y", dist.Categorical(torch.ones(3)))
    pyro.sample("x", dist.Normal(torch.tensor([0.0, 1.0, 2.0])[y], 1.0), obs=labels.sum() * 0.5)


def labels_as_vectors(labels):
    pyro.sample("y", dist.Categorical(torch.ones(3)))
    vectors = nn.functional.one_hot(labels, 3).float()
    pyro.sample("x", dist.Normal(vectors, 1.0).to_event(2), obs=torch.ones(len(labels), 3))


PROGRAMS = {
    "one-hot sites": (one_hot_programs, one_hot_latent),
    "index by a draw": (index_by_a_draw, scalar_latent),
    "labels as vectors": (labels_as_vectors, scalar_latent),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_discrete_draws_take_the_steps_of_svi(name):
    model, guide = PROGRAMS[name]
    labels = torch.tensor([0, 2, 1, 2])
    losses = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = cls(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)
        losses.append([svi.step(labels) for _ in range(10)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
