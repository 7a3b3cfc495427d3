"""Runs of several processes: their data, epochs, checkpoints and ends."""

import os
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pyro_ext.distributed import DistributedNoise, ShardedDataset
from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import EagerSVI, EarlyStopping
from tests.distributed.pool import SIZES
from tests.distributed.test_training import assert_equal
from tests.distributed.training import loader, make, parameters, rows

pytestmark = pytest.mark.long


def run(data, num_epochs=2, name="local plate", is_compiled=False, per_row=True, **options):
    """Losses and parameters of a run, whose draws do not depend on the number of processes."""
    svi = make(name, is_compiled)
    if per_row:
        with DistributedNoise("data", seed=7, per_row=True):
            svi.run(data, num_epochs, progress_bar=False, **options)
    else:
        svi.run(data, num_epochs, progress_bar=False, **options)
    return svi.history.losses, parameters(), svi.history.epoch_ends


def shares(batches):
    """The rows of this process in each minibatch, as a DistributedSampler divides them."""
    processes = current_processes()
    if processes is None:
        return batches
    found = [batch[processes.rank :: processes.size] for batch in batches]
    return [batch for batch in found if len(batch)]


def run_uneven(kind):
    """A run whose last minibatches have 7 rows, and then one row, which only rank 0 gets."""
    batches = shares([*rows(32).split(8), rows(7), rows(1)])
    return run((lambda: Stream(batches) if kind == "stream" else batches)())


class Stream(IterableDataset):
    """Minibatches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["list", "stream"])
@pytest.mark.parametrize("size", SIZES)
def test_uneven_minibatches_are_weighted_by_their_rows(pools, kind, size):
    expected = run_uneven(kind)
    assert expected[2] == [6, 12]
    for found in pools(size).results(run_uneven, kind):
        assert_equal(found, expected)
        assert found[2] == expected[2]


class Rows(IterableDataset):
    """Rows in another order in each epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(38, generator=torch.Generator().manual_seed(self.epoch))
        return iter(rows(38)[order])


def run_stream(num_workers):
    size = current_processes().size if current_processes() else 1
    data = ShardedDataset(Rows())
    return run(DataLoader(data, batch_size=8 // size, num_workers=num_workers))


def test_a_stream_is_divided_among_processes(pools):
    expected = run_stream(0)
    assert expected[2] == [5, 10]
    for found in pools(2).results(run_stream, 0):
        assert_equal(found, expected)


@pytest.mark.slow
def test_workers_of_loaders_divide_a_stream(pools):
    first, second = pools(2).results(run_stream, 2)
    assert first[0] == second[0]
    assert first[2] == second[2] == [6, 12]


def seen_rows(shuffle):
    """The rows of two epochs that a plain DataLoader gives to a process."""
    seen = []
    svi = make("pathwise")
    step = svi.step
    svi.step = lambda x: (seen.append((1000 * x[:, 0]).round().tolist()), step(x))[1]
    data = torch.arange(40.0).unsqueeze(-1).expand(40, 3) / 1000
    svi.run(DataLoader(data, batch_size=4, shuffle=shuffle), 2, progress_bar=False)
    return seen, svi.history.losses


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_plain_loader_is_divided(pools, shuffle):
    first, second = pools(2).results(seen_rows, shuffle)
    assert first[1] == second[1]
    assert len(first[0]) == 10
    parts = [seen[i : i + 5] for seen in (first[0], second[0]) for i in (0, 5)]
    epochs = [[x for batch in part for x in batch] for part in parts]
    for of_first, of_second in zip(epochs[:2], epochs[2:], strict=True):
        assert sorted(of_first + of_second) == list(range(40))
    assert (epochs[0] != epochs[1]) == shuffle
    if not shuffle:
        assert epochs[0] == list(range(0, 40, 2))


def draws(seed):
    """The draws of a global and a local site in each of three steps."""
    found = []

    def model(x):
        with pyro.plate("data", 40, subsample=x):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        shift = pyro.sample("shift", dist.Gamma(2.0, 1.0), infer={"is_auxiliary": True})
        with pyro.plate("data", 40, subsample=x):
            z = pyro.sample("z", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})
        found.append((shift.item(), *z.tolist()))

    pyro.set_rng_seed(seed)
    svi = EagerSVI(model, guide, pyro.optim.SGD({"lr": 1e-4}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(torch.zeros(2) + current_processes().rank)
    return found[-3:]


def test_global_draws_are_equal_and_local_draws_differ(pools):
    found = pools(4).results(draws, 0)
    assert found == pools(4).results(draws, 0)
    assert found != pools(4).results(draws, 1)
    for steps in zip(*found, strict=True):
        assert len({shift for shift, *_ in steps}) == 1
        assert len({z for _, *zs in steps for z in zs}) == 8
    assert len({shift for shift, *_ in found[0]}) == 3


def losses_of_all_rows(num_steps):
    """Losses of a program without plates, at fixed parameters."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.full((20,), 0.3))

    def guide():
        loc = pyro.param("loc", torch.zeros(20))
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = EagerSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), pyro.infer.Trace_ELBO())
    return svi.run(num_steps, progress_bar=False).losses


def test_processes_with_all_rows_draw_different_numbers(pools):
    one = torch.tensor(losses_of_all_rows(400)).var()
    first, second = (torch.tensor(x) for x in pools(2).results(losses_of_all_rows, 400))
    assert torch.equal(first, second)
    assert abs(first.var() / one - 0.5) < 4.5 * 0.056  # its standard error


def interrupted_run(folder, is_compiled, per_row):
    """A run that is saved after 7 of 15 steps, then resumed in a new SVI."""
    path = f"{folder}/{is_compiled}-{per_row}.pt"
    options = {"name": "local plate", "is_compiled": is_compiled, "per_row": per_row}
    whole = run(loader(8), 3, **options)
    stop = {"callback": lambda history: len(history.losses) == 7, "checkpoint": path}
    run(loader(8), 3, **options, **stop)
    return whole, run(loader(8), 3, **options, resume=path)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(pools, tmp_path, is_compiled, per_row):
    for whole, resumed in pools(2).results(interrupted_run, str(tmp_path), is_compiled, per_row):
        assert whole[0] == resumed[0]
        for name, value in whole[1].items():
            assert torch.equal(value, resumed[1][name])


def run_to(path, num_epochs):
    return run(loader(8), num_epochs, checkpoint=path)


def run_from(path, num_epochs):
    return run(loader(8), num_epochs, resume=path)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1), (1, 2)])
def test_a_run_resumes_with_another_number_of_processes(pools, tmp_path, before, after):
    def of_size(size, function, *args):
        return [function(*args)] if size == 1 else pools(size).results(function, *args)

    path = str(tmp_path / "run.pt")
    (started, *_) = of_size(before, run_to, path, 2)
    expected = run(loader(8), 4)
    for found in of_size(after, run_from, path, 4):
        assert found[0][:10] == started[0]
        torch.testing.assert_close(
            torch.tensor(found[0][:10]), torch.tensor(expected[0][:10]), rtol=1e-5, atol=0
        )
        assert found[2] == [5, 10, 15, 20]


def stop_early(is_of_rank_1):
    """A run whose held-out loss rises in one process only."""
    values = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    rank = current_processes().rank
    stopping = EarlyStopping(2, evaluate=lambda: next(values) if rank == 1 else 0.0)
    callback = stopping if is_of_rank_1 else lambda history: rank == 1 and len(history.losses) == 3
    svi = make("pathwise")
    history = svi.run(loader(8), 9, progress_bar=False, callback=callback)
    return len(history.losses), history.is_converged, history.evaluations


def test_processes_stop_together(pools):
    first, second = pools(2).results(stop_early, True)
    assert first == second
    assert first[:2] == (15, True)
    assert [loss for _, loss in first[2]] == [0.5, 1.0, 1.5]
    assert [found[0] for found in pools(2).results(stop_early, False)] == [3, 3]


def signal_rank_1(folder):
    """Rank 1 gets an interrupt in its fifth step."""

    def callback(history):
        if current_processes().rank == 1 and len(history.losses) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    svi = make("pathwise")
    checkpoint = f"{folder}/run.pt"
    try:
        svi.run(loader(8), 9, progress_bar=False, callback=callback, checkpoint=checkpoint)
    except KeyboardInterrupt:
        return "interrupted", len(svi.history.losses)
    except RuntimeError as error:
        return str(error), len(svi.history.losses)


def test_an_interrupt_of_one_process_ends_all_after_the_same_step(pools, tmp_path):
    first, second = pools(2).results(signal_rank_1, str(tmp_path))
    assert second == ("interrupted", 5)
    assert first[1] == 5
    assert "another process was interrupted, so this one ends, too, after step 5" in first[0]
    assert (tmp_path / "run.pt").exists()


def step_many(num_steps):
    svi = make("pathwise")
    svi.optim = pyro.optim.SGD({"lr": 0.0})
    batch = rows()[:8]
    batch = batch[current_processes().rank :: 2] if current_processes() else batch
    return [svi.step(batch) for _ in range(num_steps)]


@pytest.mark.slow
def test_the_loss_of_processes_has_the_mean_of_that_of_one(pools):
    one = torch.tensor(step_many(2000)).double()
    (two, other) = (torch.tensor(x).double() for x in pools(2).results(step_many, 2000))
    assert torch.equal(two, other)
    gap = (one.mean() - two.mean()).abs()
    std_error = ((one.var() + two.var()) / 2000).sqrt()
    assert gap < 4.5 * std_error
    assert 0.5 < two.std() / one.std() < 2
