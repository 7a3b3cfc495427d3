"""Bad input and interrupts in several processes: an error or a result in all of them."""

import signal
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from pyro_ext.diagnostics import loo, simulation_based_calibration
from pyro_ext.infer import (
    EvidenceState,
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
)
from tests.distributed.given_draws import (
    X,
    figures,
    guide,
    model,
    plate_guide,
    plate_model,
    row_guide,
    row_model,
)

pytestmark = pytest.mark.long

ROWS = TensorDataset(X, torch.arange(23))


def rank():
    return distributed.get_rank()


def by_loader(loader, **options):
    pyro.param("scale", torch.tensor(1.3))
    return estimate_evidence(row_model, row_guide, data_loader=loader, **options)


def divided_sampler():
    by_loader(DataLoader(ROWS, batch_size=4, sampler=DistributedSampler(ROWS)))


def divided_rows():
    by_loader(DataLoader(Subset(ROWS, range(11 * rank(), 11 * rank() + 11)), batch_size=4))


def divided_stream():
    by_loader([(X[11 * rank() :][:4], torch.arange(4)), (X[:4], torch.arange(4))])


def other_number():
    by_loader(list(DataLoader(ROWS, batch_size=4)) if rank() else [])


def fewer_batches():
    by_loader(list(DataLoader(ROWS, batch_size=4))[: 5 - 4 * rank()])


def other_order():
    generator = torch.Generator().manual_seed(rank())
    by_loader(DataLoader(ROWS, batch_size=4, shuffle=True, generator=generator))


def other_data():
    estimate_evidence(model, guide, X + rank())


def other_large_data():
    x = torch.zeros(1000, 1000)
    estimate_expectation(model, guide, x=x + rank())


def other_setting():
    estimate_evidence(model, guide, X, num_samples=100 * (1 + rank()))


def bad_setting():
    estimate_evidence(model, guide, X, num_samples=50 * rank())


def other_parameter():
    by_loader([(X, torch.arange(23))] * 2 if pyro.param("scale", torch.tensor(1.0 + rank())) else 0)


def other_state():
    state = EvidenceState()
    if rank() == 1:
        state.is_complete = True
    estimate_evidence(model, guide, X, state=state)


def missing_rows():
    by_loader(DataLoader(ROWS, batch_size=4, drop_last=True), num_rows=23)


def double_rows():
    by_loader(list(DataLoader(ROWS, batch_size=4)) * 2, num_rows=23)


def no_rows():
    by_loader([])


def nan_rows():
    def nan_model(x, i):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("factor", torch.where(i == 6, torch.nan, z))

    with pyro.validation_enabled(False):
        estimate_evidence(nan_model, row_guide, data_loader=DataLoader(ROWS, batch_size=4))


def broken_model(x):
    if rank() == 1:
        raise ArithmeticError("no such model")
    return model(x)


def broken():
    estimate_evidence(broken_model, guide, X)


def broken_late():
    calls = []

    def late_model(x):
        calls.append(x)
        return model(x) if len(calls) < 20 else broken_model(x)

    estimate_expectation(late_model, guide, X, num_samples=1000, chunk_size=5)


def broken_block():
    def broken_rows():
        with pyro.plate("rows", len(X)) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = X[i] if rank() == 0 else X[i][:1].expand(len(i) + 1)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    estimate_evidence(broken_rows, plate_guide, data_plate="rows", batch_size=4)


def broken_chains():
    annealed_importance_sampling(broken_model, guide, X, num_temperatures=5)


def broken_fit():
    def make_guide(model, data):
        raise ArithmeticError("no such guide") if rank() else KeyError("no guide here")

    simulation_based_calibration(model, make_guide, X)


def other_calibration():
    simulation_based_calibration(model, lambda model, data: guide, X, num_steps=rank())


def other_loo():
    loo(model, guide, X, num_samples=100 + rank())


#: What each rank says. One text stands for all ranks.
ERRORS = [
    (divided_sampler, "ValueError: estimate_evidence: data_loader has a DistributedSampler, "),
    (divided_rows, "the first row of data_loader of rank 1 is not that of rank 0. Pass a loader"),
    (divided_stream, "the first batch of data_loader of rank 1 is not that of rank 0. Pass a lo"),
    (other_number, "the first batch of data_loader of rank 1 is not that of rank 0. Pass a lo"),
    (fewer_batches, "data_loader has other numbers of batches on some ranks. Pass a loader ov"),
    (other_order, "the order of the batches of data_loader of rank 1 is not that of rank 0. "),
    (other_data, "the argument 'x' of rank 1 is not that of rank 0. estimate_evidence divides"),
    (other_large_data, "the argument 'x' of rank 1 is not that of rank 0. estimate_expectation"),
    (other_setting, "num_samples is 200 on rank 1, but 100 on rank 0. Pass the same on each ra"),
    (bad_setting, ("num_samples must be at least 1", "rank 0 of 2 failed with ValueError: estim")),
    (other_parameter, "the parameter 'scale' of rank 1 is not that of rank 0. Train, or load "),
    (other_state, "the state of rank 1 is not that of rank 0"),
    (missing_rows, "the batches of data_loader have 20 rows, but num_rows is 23. Pass all rows"),
    (double_rows, "the first 7 batches of data_loader have 27 rows, but num_rows is 23. A row "),
    (no_rows, "data_loader has no batches"),
    (nan_rows, ("rank 1 of 2 failed with ValueError: estimate_evidence: a log weight", "[6]")),
    (broken, ("rank 1 of 2 failed with ArithmeticError: no such model", "no such model")),
    (broken_late, ("rank 1 of 2 failed with ArithmeticError: no such model", "no such model")),
    (broken_block, ("estimate_evidence: rank 1 of 2 failed with ", "With batch_size=4, model and")),
    (broken_chains, ("rank 1 of 2 failed with ArithmeticError: no such model", "no such model")),
    (broken_fit, ("KeyError: 'no guide here'", "ArithmeticError: no such guide")),
    (other_calibration, "num_steps is 1 on rank 1, but 0 on rank 0"),
    (other_loo, "num_samples is 101 on rank 1, but 100 on rank 0"),
]


@pytest.mark.parametrize(("call", "texts"), ERRORS, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_input_is_an_error_of_all_processes(pools, call, texts):
    texts = (texts, texts) if isinstance(texts, str) else texts
    for found, text in zip(pools(2).errors(call), texts, strict=True):
        assert text in found
    assert pools(2).results(figures_of_all) == pools(2).results(figures_of_all)


def figures_of_all():
    """Calls after an error, which must not meet messages of the call before."""
    return figures(estimate_evidence(model, guide, X, num_samples=50))


class Stopped:
    """A program with Ctrl-C at a call in some processes."""

    def __init__(self, program, call, ranks):
        self.program, self.call, self.ranks, self.calls = program, call, ranks, 0
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.call and rank() in self.ranks:
            signal.raise_signal(signal.SIGINT)
        return self.program(*args)


def stopped_draws(stopped):
    options = {"num_samples": 1000, "chunk_size": 10, "max_plate_nesting": 1}
    return figures(estimate_evidence(stopped(model), guide, X, **options))


def stopped_rows(stopped):
    pyro.param("scale", torch.tensor(1.3))
    options = {"data_loader": DataLoader(ROWS, batch_size=2), "num_samples": 50, "chunk_size": 10}
    return figures(estimate_evidence(stopped(row_model), row_guide, **options))


def stopped_blocks(stopped):
    options = {"data_plate": "rows", "batch_size": 2, "num_samples": 50, "chunk_size": 10}
    state = EvidenceState()
    found = estimate_evidence(stopped(plate_model), plate_guide, state=state, **options)
    assert not state.is_complete
    # The rest of the rows follows. Their draws are given, so the result is that of one process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    whole = estimate_evidence(plate_model, plate_guide, state=state, **options)
    assert whole.log_evidence.shape == X.shape
    return figures(found), figures(whole)


def stopped_expectation(stopped):
    options = {"num_samples": 1000, "chunk_size": 10, "max_plate_nesting": 1}
    return figures(estimate_expectation(stopped(model), guide, X, **options))


def stopped_chains(stopped):
    options = {"num_chains": 20, "num_temperatures": 3, "chunk_size": 2, "num_leapfrog_steps": 1}
    return figures(annealed_importance_sampling(stopped(model), guide, X, **options))


def stopped_fits(stopped):
    def make_guide(model, data):
        return stopped(guide)

    options = {"num_simulations": 12, "num_samples": 5, "num_steps": 0, "vectorize": False}
    found = simulation_based_calibration(model, Sequence(stopped), X, **options)
    return {name: x.tolist() for name, x in found.probabilities.items()}


class Sequence:
    """Guides of one simulation after the other, with one count of calls."""

    def __init__(self, stopped):
        self.guide = stopped(guide)

    def __call__(self, model, data):
        return self.guide


STOPS = [
    (stopped_draws, 8),
    (stopped_rows, 12),
    (stopped_blocks, 9),
    (stopped_expectation, 9),
    (stopped_chains, 58),
    (stopped_fits, 12),
]


def stop(call, at, ranks):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call(lambda program: Stopped(program, at, ranks))
    return found, [str(w.message) for w in caught if "interrupted" in str(w.message)]


@pytest.mark.sampled
@pytest.mark.parametrize(("call", "at"), STOPS, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1, 2, 3), (1, 3)])
def test_an_interrupt_ends_all_processes_with_the_draws_so_far(pools, call, at, ranks):
    found = pools(4).results(stop, call, at, ranks)
    assert found == found[:1] * 4
    assert len(found[0][1]) == 1
    pools(4).results(figures_of_all)


def stop_first(ranks):
    try:
        annealed_importance_sampling(Stopped(model, 20, ranks), guide, X, num_temperatures=5)
    except (KeyboardInterrupt, RuntimeError) as error:
        return type(error).__name__


@pytest.mark.parametrize("ranks", [(0,), (0, 1)])
def test_an_interrupt_before_the_first_draws_ends_all_processes(pools, ranks):
    expected = ["KeyboardInterrupt" if rank in ranks else "RuntimeError" for rank in range(2)]
    assert pools(2).results(stop_first, ranks) == expected
    pools(2).results(figures_of_all)
