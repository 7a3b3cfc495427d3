"""Programs of users: work on rank 0 only, several SVIs, rare parameters, buffers, and resuming."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pyro_ext.infer import estimate_evidence
from tests.distributed.habits import KINDS, make, mean, parameters, rank, size

pytestmark = pytest.mark.long


def run_with_rank_0(folder):
    """A run whose callback and checkpoint only rank 0 passes, and a file that only it saves."""
    svi = make(mean)
    batches = [torch.arange(4.0) + rank() for _ in range(3)]
    seen = []
    only = {"callback": lambda history: seen.append(1), "checkpoint": f"{folder}/run.pt"}
    svi.run(batches, 2, progress_bar=False, **(only if rank() == 0 else {}))
    if rank() == 0:
        svi.save(f"{folder}/saved.pt")
    svi.step(batches[0])
    pyro.clear_param_store()
    again = make(mean)
    again.load(f"{folder}/saved.pt", batches[0])
    again.step(batches[0])
    return len(seen), svi.history.losses == again.history.losses, parameters()


def test_rank_0_may_do_more_than_the_others(pools, tmp_path):
    first, second = pools(2).results(run_with_rank_0, str(tmp_path))
    assert (first[0], second[0]) == (6, 0)
    assert first[1:] == second[1:]
    assert (tmp_path / "run.pt").exists()


def orders(folder):
    """The first minibatch of three runs, and of a fourth that resumes the third."""
    seen = []
    svi = make(mean)
    step = svi.step
    svi.step = lambda x: (seen.append(x.tolist()), step(x))[1]
    data = DataLoader(torch.arange(40.0), batch_size=4, shuffle=True)
    path = f"{folder}/run.pt"
    firsts = []
    for _ in range(3):
        seen.clear()
        svi.run(data, 2, progress_bar=False, checkpoint=path)
        firsts.append((seen[0], seen[5]))
    pyro.set_rng_seed(123)
    seen.clear()
    svi.run(data, 3, progress_bar=False, resume=path)
    return [*firsts, (seen[0],)]


def test_each_run_has_an_order_of_its_own(pools, tmp_path):
    for found in pools(2).results(orders, str(tmp_path)):
        batches = [tuple(batch) for run in found for batch in run]
        assert len(set(batches)) == 7


def resumed(folder, seed):
    """Whether a run with a shuffled loader, resumed with another seed, is as uninterrupted."""

    def go(**options):
        pyro.clear_param_store()
        data = DataLoader(torch.arange(40.0) / 40, batch_size=4, shuffle=True)
        return make(mean).run(data, 2, progress_bar=False, **options).losses

    path = f"{folder}/{seed}.pt"
    pyro.set_rng_seed(0)
    whole = go()
    pyro.set_rng_seed(0)
    go(checkpoint=path, callback=lambda history: len(history.losses) == 3)
    pyro.set_rng_seed(seed)
    return whole == go(resume=path)


def test_the_seed_of_a_resumed_run_does_not_matter(pools, tmp_path):
    assert pools(2).results(resumed, str(tmp_path), 123) == [True, True]


def mean_of_three():
    def model(x):
        with pyro.plate("data", 3, subsample=x):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    svi = make(model, optim=pyro.optim.SGD({"lr": 0.1}))
    data = DataLoader(torch.tensor([9.0, 0.0, 0.0]), batch_size=2)
    svi.run(data, 200, progress_bar=False)
    return parameters()["loc"]


def test_no_row_counts_twice(pools):
    assert pools(2).results(mean_of_three) == [pytest.approx(3.0)] * 2


class Stream(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def resumed_uneven(folder, kind):
    """Whether a run that is saved while rank 1 has no more data goes on as uninterrupted."""
    batches = [torch.arange(4.0) + rank() + i for i in range(5 - 2 * rank())]
    path = f"{folder}/{kind}.pt"

    def go(num_epochs, **options):
        pyro.clear_param_store()
        data = batches if kind == "list" else Stream(batches)
        return make(mean).run(data, num_epochs, progress_bar=False, **options).losses

    whole = go(3)
    go(1, checkpoint=path, callback=lambda history: len(history.losses) == 4)
    return len(whole), whole == go(3, resume=path)


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_an_uneven_run_is_resumed(pools, tmp_path, kind):
    assert pools(2).results(resumed_uneven, str(tmp_path), kind) == [(15, True)] * 2


def rare_parameters(kind, is_created_before):
    """Parameters after steps in which a rank, then the other, uses one that is new."""
    if is_created_before:
        pyro.set_rng_seed(rank())
        pyro.param("shift", torch.randn(()))
    svi = make(mean, kind, pyro.optim.Adam({"lr": 0.1}))
    x = torch.arange(4.0) + rank()
    for who in (None, 1, 1, None, 0, None, 1):
        svi.step(x, rank() == who)
    return parameters()


@KINDS
@pytest.mark.parametrize("is_created_before", [False, True])
def test_a_parameter_of_single_ranks_is_trained_by_all(pools, kind, is_created_before):
    first, second = pools(2).results(rare_parameters, kind, is_created_before)
    assert first == second
    assert first.keys() == {"loc", "shift"}


def two_objectives():
    """The parameter of one SVI before and after steps of another, with weight decay."""

    def other(x):
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(pyro.param("other", torch.tensor(1.0)), 1.0), obs=x)

    svi = make(mean, optim=pyro.optim.SGD({"lr": 1e-2, "weight_decay": 0.5}))
    x = torch.arange(4.0) + rank()
    svi.step(x, True)
    make(other).step(x)
    before = parameters()["other"]
    for _ in range(3):
        svi.step(x, rank() == 1)
    return before, parameters()["other"]


def test_an_svi_leaves_parameters_of_another_alone(pools):
    for before, after in pools(2).results(two_objectives):
        assert before == after


def rare_in_small_batches(kind):
    """Training with momentum, where the last minibatch is small and only rank 0 has it."""

    def model(x):
        mean(x, len(x) > 2)

    svi = make(model, kind, pyro.optim.Adam({"lr": 0.1}))
    whole = [torch.arange(8.0) + i for i in range(3)]
    last = [torch.tensor([1.0, 2.0])] if rank() == 0 else []
    svi.run([x[rank() :: size()] for x in whole] + last, 3, progress_bar=False)
    return parameters()


def tied(kind):
    """Training of a module under two names, where rank 1 has no last minibatch."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1)
    parts = [nn.Sequential(net), nn.Sequential(net)]

    def model(x):
        loc = sum(pyro.module(f"part{i}", part)(x[:, None])[:, 0] for i, part in enumerate(parts))
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = make(model, kind, pyro.optim.SGD({"lr": 1e-4}))
    whole = [torch.arange(8.0) + i for i in range(3)]
    last = [torch.tensor([1.0, 2.0])] if rank() == 0 else []
    svi.run([x[rank() :: size()] for x in whole] + last, 3, progress_bar=False)
    return parameters()


@KINDS
@pytest.mark.parametrize("train", [rare_in_small_batches, tied])
def test_a_rank_without_data_updates_as_the_others(pools, train, kind):
    expected = train(kind)
    first, second = pools(2).results(train, kind)
    assert first == second
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(value))


class Normalised(nn.Module):
    """A network with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.average.mul_(0.9).add_(0.1 * x.mean())
        return self.norm(x)


def buffers():
    """Buffers and a baseline after a run, and evidence that needs equal values."""
    net = Normalised()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", 40, subsample=x):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            loc = net(x) + z.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", 40, subsample=x):
            options = {"baseline": {"use_decaying_avg_baseline": True}}
            pyro.sample("z", dist.Bernoulli(p), infer=options)

    svi = make(model, guide=guide)
    data = torch.randn(8, 2, generator=torch.Generator().manual_seed(rank()))
    svi.run([data, data], 3, progress_bar=False)
    net.eval()
    rows = torch.randn(40, 2, generator=torch.Generator().manual_seed(9))
    found = estimate_evidence(svi, rows, num_samples=10)
    return {name: x.tolist() for name, x in net.state_dict().items()}, found.log_evidence.tolist()


def test_buffers_are_equal_after_a_run(pools):
    first, second = pools(2).results(buffers)
    assert first == second
