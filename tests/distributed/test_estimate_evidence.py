import math
import multiprocessing

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pyro_ext.infer import EvidenceState, estimate_evidence
from tests.distributed.given_draws import (
    InTurns,
    X,
    figures,
    guide,
    model,
    plate_guide,
    plate_model,
    row_guide,
    row_model,
)
from tests.distributed.pool import SIZES

pytestmark = pytest.mark.long


def evidence_of(options):
    found = estimate_evidence(model, guide, X, max_plate_nesting=1, **options)
    return figures(found), torch.rand(()).item()


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_one_process_after_the_other(pools, size):
    options = {"num_samples": 40 * size, "chunk_size": 10, "jackknife_orders": (1, 2)}
    found = pools(size).results(evidence_of, options)
    in_turns = InTurns(guide, size)
    expected = estimate_evidence(model, in_turns, X, max_plate_nesting=1, **options)
    assert in_turns.calls == 4 * size + 1
    for figures_of_rank, after in found:
        assert figures_of_rank == figures(expected)
        assert after == found[0][1]


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(1003, 100), (3, None), (1, 1), (250, 7)])
def test_the_number_of_draws_is_exact(pools, num_samples, chunk_size):
    options = {"num_samples": num_samples, "chunk_size": chunk_size, "jackknife_orders": ()}
    found = pools(4).results(evidence_of, options)
    assert found[0][0]["num_samples "] == num_samples
    assert found == found[:1] * 4


def evidence_until(target):
    found = estimate_evidence(model, guide, X, num_samples=100_000, target_std_error=target)
    return found.num_samples, found.log_evidence.tolist(), found.std_error.tolist()


def test_the_target_stops_all_processes_and_the_evidence_is_right(pools):
    found = pools(4).results(evidence_until, 0.01)
    assert found == found[:1] * 4
    num_samples, log_evidence, std_error = found[0]
    assert 100 <= num_samples < 100_000
    assert max(std_error) <= 0.01
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    z = (torch.tensor(log_evidence) - exact) / torch.tensor(std_error)
    assert z.abs().max() < 4.5


class Rows(Dataset):
    def __init__(self, x=X):
        self.x, self.loaded = x, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.loaded.append(i)
        return self.x[i], i


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, range(len(X)), strict=True))


def batches():
    for start in torch.randperm(6).tolist():  # in a random order
        yield X[4 * start : 4 * start + 4], torch.arange(4 * start, 4 * start + 4)


LOADERS = {
    "map-style": lambda: DataLoader(Rows(), batch_size=4),
    "without batches": lambda: DataLoader(
        Rows(), batch_size=None, sampler=[[i, i + 1] for i in range(0, 22, 2)]
    ),
    "workers": lambda: DataLoader(Rows(), batch_size=4, num_workers=1, persistent_workers=True),
    "iterable data set": lambda: DataLoader(Stream(), batch_size=4),
    "list": lambda: list(DataLoader(Rows(), batch_size=4)),
    "one batch": lambda: DataLoader(Rows(), batch_size=23),
}


def evidence_by_rows(name):
    scale = pyro.param("scale", torch.tensor(1.3))
    multiprocessing.current_process()._config["daemon"] = False  # so that it may have workers
    found = estimate_evidence(row_model, row_guide, data_loader=LOADERS[name](), num_samples=100)
    return figures(found), scale.item()


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x == "workers" else x for x in LOADERS]
)
def test_batches_of_a_loader_are_those_of_one_process(pools, name):
    expected, _ = evidence_by_rows(name)
    for size in (2, 4):
        for found, _ in pools(size).results(evidence_by_rows, name):
            assert found == expected


def evidence_of_shuffled(name):
    pyro.param("scale", torch.tensor(1.3))
    rows = Rows()
    loader = batches()
    if name == "map-style":
        generator = torch.Generator().manual_seed(3)
        loader = DataLoader(rows, batch_size=4, shuffle=True, generator=generator)
    if name == "default generator":
        torch.manual_seed(distributed.get_rank())
        loader = DataLoader(rows, batch_size=4, shuffle=True)
    seen = []

    def noting_model(x, i):
        seen.append(tuple(i.tolist()))
        row_model(x, i)

    found = estimate_evidence(noting_model, row_guide, data_loader=loader, num_samples=100)
    return figures(found), set(seen), rows.loaded


@pytest.mark.parametrize("name", ["map-style", "default generator", "iterable"])
def test_shuffled_rows_come_once(pools, name):
    found = pools(4).results(evidence_of_shuffled, name)
    assert all(of_rank == found[0][0] for of_rank, _, _ in found)
    batches_by_rank = [seen for _, seen, _ in found]
    assert sum(map(len, batches_by_rank)) == 6
    assert len(set.union(*batches_by_rank)) == 6
    if name != "iterable":
        assert sorted(i for seen in batches_by_rank for batch in seen for i in batch) == [
            *range(23)
        ]
        for _, seen, loaded in found:  # the first row is compared
            assert sorted(loaded[1:]) == sorted(i for batch in seen for i in batch)


def evidence_by_plate(batch_size):
    return figures(
        estimate_evidence(
            plate_model, plate_guide, data_plate="rows", batch_size=batch_size, num_samples=100
        )
    )


@pytest.mark.parametrize("batch_size", [2, 6, 20, 30])
def test_blocks_of_a_plate_are_those_of_one_process(pools, batch_size):
    expected = evidence_by_plate(batch_size)
    for size in (2, 4):
        assert pools(size).results(evidence_by_plate, batch_size) == [expected] * size


def evidence_with_new_parameters(is_loaded):
    """Each process makes its own parameters, with other random numbers."""
    torch.manual_seed(distributed.get_rank())

    def wide_guide(x, i):
        scale = pyro.param("wide", lambda: torch.rand(()) + 1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    options = {"data_loader": LOADERS["map-style"]()} if is_loaded else {"model_args": (X, [0])}
    found = estimate_evidence(row_model, wide_guide, num_samples=100, **options)
    return figures(found), pyro.param("scale").item(), pyro.param("wide").item()


@pytest.mark.parametrize("is_loaded", [True, False])
def test_parameters_that_the_call_makes_are_the_same(pools, is_loaded):
    found = pools(4).results(evidence_with_new_parameters, is_loaded)
    assert found == found[:1] * 4


def minibatch_model():
    with pyro.plate("rows", len(X), subsample_size=5) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[i])


def minibatch_guide():
    with pyro.plate("rows", len(X), subsample_size=5) as i:
        pyro.sample("z", dist.Normal(X[i] / 2, math.sqrt(0.5)))


def evidence_of_minibatch():
    return estimate_evidence(minibatch_model, minibatch_guide, num_samples=400).log_evidence


def test_all_processes_have_the_same_minibatch(pools):
    found = pools(4).results(evidence_of_minibatch)[0]
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
    assert ((found[:, None] - exact).abs().min(1).values < 1e-5).all()


def evidence_with_state(options, load, save):
    """A call that goes on from a file."""
    state = EvidenceState() if load is None else EvidenceState.load(load)
    if "data_loader" in options:
        options = {**options, "data_loader": LOADERS[options["data_loader"]]()}
        programs = row_model, row_guide
    elif "batch_size" in options:
        programs = plate_model, plate_guide
    else:
        programs = model, guide, X
    pyro.param("scale", torch.tensor(1.0))
    found = estimate_evidence(*programs, state=state, **options)
    # Any process can save the state.
    if not distributed.is_initialized() or distributed.get_rank() == 1:
        state.save(save)
    return figures(found)


MODES = {
    "draws": {},
    "loader": {"data_loader": "map-style"},
    "one batch": {"data_loader": "one batch"},
    "plate": {"data_plate": "rows", "batch_size": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_state_of_any_process_goes_on_with_any_number(pools, tmp_path, mode):
    paths = [str(tmp_path / f"{i}.pt") for i in range(4)]
    few, more = ({**MODES[mode], "num_samples": n, "chunk_size": 50} for n in (300, 900))
    first = pools(2).results(evidence_with_state, few, None, paths[0])
    wide = pools(4).results(evidence_with_state, more, paths[0], paths[1])
    alone = evidence_with_state(more, paths[0], paths[2])
    joined = pools(2).results(
        evidence_with_state, {**more, "num_samples": 1200}, paths[2], paths[3]
    )
    for found in (first, wide, joined):
        assert found == found[:1] * len(found)
    results = [first[0], wide[0], alone, joined[0]]
    assert [found["num_samples "] for found in results] == [300, 900, 900, 1200]
    assert wide[0] != alone or mode != "draws"
    # Loading a complete state draws nothing.
    again = pools(4).results(evidence_with_state, {**more, "num_samples": 1200}, paths[3], paths[0])
    assert again == joined[:1] * 4
    if mode == "draws":
        exact = dist.Normal(0.0, math.sqrt(2)).log_prob(X)
        for found in results:
            log_evidence, std_error = (
                torch.frombuffer(bytearray(found[f"{name} "][1]), dtype=torch.float64)
                for name in ("log_evidence", "std_error")
            )
            assert ((log_evidence - exact) / std_error).abs().max() < 4.5


RANK = 0


def evidence_with_rank(num_samples, path, is_new):
    """The programs reach a number that differs between processes."""
    global RANK
    RANK = distributed.get_rank()

    def ranked_model(x):
        model(x + 0 * RANK)

    state = EvidenceState() if is_new else EvidenceState.load(path)
    found = estimate_evidence(ranked_model, guide, X, state=state, num_samples=num_samples)
    if RANK == 1:
        state.save(path)
    return found.num_samples


def test_values_that_differ_between_processes_are_not_kept(pools, tmp_path):
    path = str(tmp_path / "state.pt")
    assert pools(2).results(evidence_with_rank, 100, path, True) == [100] * 2
    assert pools(4).results(evidence_with_rank, 300, path, False) == [300] * 4


def weights_with_state(path):
    """The weights that a call adds, in a guide that remembers its draws."""
    drawn = []

    def noting_guide(x):
        with pyro.plate("data", len(x)):
            drawn.append(pyro.sample("z", dist.Normal(x / 2, 0.8)).reshape(-1)[-1].item())

    state = EvidenceState() if path is None else EvidenceState.load(path)
    for num_samples in (20, 40, 60):
        options = {"num_samples": num_samples, "chunk_size": 5, "max_plate_nesting": 1}
        estimate_evidence(model, noting_guide, X, state=state, **options)
    return drawn


def test_no_draws_come_twice(pools):
    found = pools(2).results(weights_with_state, None)
    for drawn in found:
        assert len(drawn) == 12
        assert len(set(drawn)) == 9
    assert len(set(found[0]) & set(found[1])) == 3
