"""Values of arguments and buffers that Python code reads, and masks as indices."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI
from pyro_ext.infer.svi.capture.replacements import get_item, one_hot
from tests.infer.svi.capture.programs import X, assert_follows, observe, still


def branch(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 3.0 if (x > 1).any() else 1.0)


def number(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for _ in range(int(x)):
        z = z + 1.0
    observe(z, x)


def list_of_numbers(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1.0 + sum((x * torch.ones(3) > 1).tolist()))


def mask(x):
    several = torch.stack([x, x + 1, x + 2])
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), several[several > 2].sum())


def selection(x):
    several = torch.stack([x, x + 1, x + 2])
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), several.masked_select(several > 2).sum())


def nonzero(x):
    several = torch.stack([x, x + 1, x + 2])
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), several[(several > 2).nonzero()].sum())


def change_in_place(x):
    several = torch.zeros(2)
    several[1] = x
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 3.0 if several.sum() > 1 else 1.0)


def equality(x):
    scale = 2.0 if torch.equal(x.round(), torch.tensor(0.0)) else 1.0
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale)


READS = {f.__name__: f for f in (branch, number, list_of_numbers, mask, selection, nonzero)}
READS |= {f.__name__: f for f in (change_in_place, equality)}


@pytest.mark.long
@pytest.mark.parametrize("name", READS)
def test_a_graph_is_taken_only_for_the_values_that_it_has_read(name):
    svi = still(READS[name], fallback=False)
    for x in (0.25, 2.5, 0.25, 2.25, 0.5):
        assert_follows(svi, torch.tensor(x))
    assert svi._graphs.count == 2


def test_arguments_that_change_a_value_at_each_step_end_in_eager_steps():
    svi = still(number, max_graphs=2)
    assert_follows(svi, torch.tensor(1.0))
    assert_follows(svi, torch.tensor(2.0))
    with pytest.warns(UserWarning, match="read another number out of their data"):
        assert_follows(svi, torch.tensor(3.0))
    assert_follows(svi, torch.tensor(2.0))


def test_numbers_that_follow_from_shapes_are_constants():
    def model(x):
        num = torch.tensor(x.shape).prod().item()
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for _ in range(num):
            z = z + 0.1
        observe(z, x.sum())

    svi = still(model, fallback=False)
    assert_follows(svi, torch.ones(2, 2))
    assert_follows(svi, torch.zeros(2, 2))
    assert svi._graphs.count == 1


def test_buffers_are_read_at_each_step():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x):
            several = torch.stack([x, x + 1, x + 2])
            observe(pyro.sample("z", dist.Normal(0.0, 1.0)), several[self.mask].sum())

    model = Masked()
    svi = still(model, fallback=False)
    assert_follows(svi, X)
    assert_follows(svi, X + 1)
    model.mask[1] = True
    assert_follows(svi, X)
    model.mask = torch.tensor([False, False, True])
    assert_follows(svi, X)
    assert svi._graphs.count == 3


def read_of_a_parameter(x):
    loc = pyro.param("loc_p", torch.tensor(0.5))
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 3.0 if loc > 1 else 1.0)


def read_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 3.0 if z.sum() > 100 else 1.0)


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.count += 1
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 3.0 if self.count > 100 else 1.0)


@pytest.mark.parametrize("make", [lambda: read_of_a_parameter, lambda: read_of_a_draw, Counter])
def test_values_that_change_in_a_step_cannot_be_read(make):
    model = make()
    svi = still(lambda x: model(x))
    with pytest.warns(UserWarning, match="uses the value of a tensor in Python code"):
        svi.step(X)


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
