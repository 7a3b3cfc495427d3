"""Steps that differ between processes or from one step to the next."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from tests.distributed.habits import make, mean, parameters, rank, size

pytestmark = pytest.mark.long


def late_plate():
    """A step with one plate, then a step with another, of which the ranks have 6 and 2 rows."""

    def model(x, name):
        with pyro.plate(name, 40, subsample=x):
            pyro.sample(f"x_{name}", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0), obs=x)

    svi = make(model, optim=pyro.optim.SGD({"lr": 1e-2}))
    x = torch.arange(8.0)
    svi.step(x[rank() :: size()], "first")
    svi.step(x if size() == 1 else (x[:6], x[6:])[rank()], "second")
    return parameters()


def whole_then_part():
    """A step with all rows in each process, then a step with uneven parts."""
    svi = make(mean, optim=pyro.optim.SGD({"lr": 1e-2}))
    svi.step(torch.arange(40.0))
    x = torch.arange(8.0)
    svi.step(x if size() == 1 else (x[:6], x[6:])[rank()])
    return parameters()


def frozen_and_wide():
    """Steps with parameters of two dtypes, one of which is frozen later."""

    def model(x):
        a = pyro.param("a", torch.tensor(0.0))
        b = pyro.param("b", torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    svi = make(model)
    svi._bucket_bytes = 4
    x = torch.arange(8.0)[rank() :: size()]
    svi.step(x)
    pyro.get_param_store().get_state()["params"]["b"].requires_grad_(False)
    for _ in range(3):
        svi.step(x)
    return parameters()


def sparse_gradients():
    """Steps of an embedding with sparse gradients."""
    torch.manual_seed(0)
    embedding = nn.Embedding(5, 1, sparse=True)

    def model(x):
        pyro.module("embedding", embedding)
        with pyro.plate("data", 40, subsample=x):
            loc = embedding(x.long()).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = make(model)
    for _ in range(3):
        svi.step(torch.tensor([0.0, 1.0, 1.0, 3.0])[rank() :: size()])
    return parameters()


def lazy_network():
    """Steps of a network that the first run makes."""
    made = []

    def model(x):
        made.extend([nn.Linear(1, 1)] if not made else [])
        pyro.module("net", made[0])
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(made[0](x.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)

    svi = make(model)
    for _ in range(3):
        svi.step(torch.arange(4.0)[rank() :: size()])
    return parameters()


def complex_parameters():
    """Steps of complex parameters, at odd places among others."""

    def model(x):
        a = pyro.param("a", torch.tensor(0.5))
        b = pyro.param("b", torch.tensor([1.0 + 0.5j, 0.3j]))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(a + (b * b.conj()).real.sum(), 1.0), obs=x)

    svi = make(model)
    for _ in range(3):
        svi.step(torch.arange(4.0)[rank() :: size()])
    return {name: torch.view_as_real(x + 0j).tolist() for name, x in pyro.get_param_store().items()}


def loss_in_float64():
    """Losses of a model in double precision, which have more digits than float32."""

    def model(x):
        a = pyro.param("a", torch.tensor(0.0, dtype=torch.float64))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x + 1e4)

    svi = make(model, optim=pyro.optim.SGD({"lr": 1e-9}))
    x = torch.arange(4.0, dtype=torch.float64)[rank() :: size()]
    return {"losses": torch.tensor([svi.step(x) for _ in range(3)], dtype=torch.float64).tolist()}


ODD = [late_plate, whole_then_part, frozen_and_wide, sparse_gradients, lazy_network]
ODD += [complex_parameters, loss_in_float64]


@pytest.mark.parametrize("train", ODD)
def test_two_processes_take_odd_steps_as_one(pools, train):
    expected = train()
    first, second = pools(2).results(train)
    assert first == second
    for name, value in expected.items():
        found, exact = (torch.tensor(x, dtype=torch.float64) for x in (first[name], value))
        rtol = 1e-12 if train is loss_in_float64 else 1e-5
        torch.testing.assert_close(found, exact, rtol=rtol, atol=1e-6 * (rtol > 1e-6))


def hidden_data():
    """Data that the model finds by a name, in a plate of the rows of a process."""
    x = torch.arange(4.0) + rank()

    def model():
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    make(model).run(2, progress_bar=False)


def swapped_plates():
    """Two plates, of which one rank has 6 and 2 rows, and the other 2 and 6."""

    def model(x, y):
        for name, value in (("first", x), ("second", y)):
            with pyro.plate(name, 40, subsample=value):
                loc = pyro.param(f"loc_{name}", torch.tensor(0.0))
                pyro.sample(f"x_{name}", dist.Normal(loc, 1.0), obs=value)

    x = torch.arange(8.0)
    make(model).step(*((x[:6], x[6:]) if rank() == 0 else (x[6:], x[:6])))


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        (hidden_data, "plate 'data' has no more rows than each of them passes (4)"),
        (swapped_plates, "have different numbers of rows: [[6, 2], [2, 6]]"),
    ],
)
def test_data_that_no_weight_fits_are_refused(pools, fail, text):
    for error in pools(2).errors(fail):
        assert text in error


def subset_samplers():
    """The largest row that a run visits, for samplers that choose rows."""
    data = torch.arange(40.0)
    found = []
    for sampler in (SequentialSampler(range(8)), RandomSampler(data, num_samples=8)):
        seen = []
        svi = make(mean)
        step = svi.step
        svi.step = lambda x, seen=seen, step=step: (seen.extend(x.tolist()), step(x))[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same rows in all processes
            svi.run(DataLoader(data, 4, sampler=sampler), progress_bar=False)
        found.append((len(seen), max(seen)))
    return found


def test_samplers_that_choose_rows_are_kept(pools):
    for (length, largest), (num_random, _) in pools(2).results(subset_samplers):
        assert (length, largest, num_random) == (8, 7.0, 8)


def reset_in_callback():
    """A run that forgets its parameters after two steps."""

    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def callback(history):
        if len(history.losses) == 2:
            pyro.clear_param_store()

    svi = make(model)
    svi.run([torch.arange(4.0) + rank()] * 4, progress_bar=False, callback=callback)
    return parameters()


def test_parameters_that_are_made_anew_are_equal(pools):
    first, second = pools(2).results(reset_in_callback)
    assert first == second
