"""Evidence from compiled graphs is that of the programs."""

import math
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from benchmarks.counting import CountingMode
from pyro_ext.infer import EvidenceState, estimate_evidence
from pyro_ext.infer.evidence import compiled_weights, unread_chunks
from tests.models import GlobalNormal, Interrupted, NormalNormal

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 0.8], dtype=torch.float64)
SETTINGS = {"num_samples": 40, "chunk_size": 10, "compile": "eager"}
pytestmark = pytest.mark.filterwarnings("ignore:.*Pareto k", "ignore:Plate 'data' holds all")


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(1, 4).double(), nn.Linear(2, 1).double()

    def model(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-1), 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x.unsqueeze(-1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def mixture(x):
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 2.0 * k, 1.0), obs=x)


def with_outer_terms(x):
    pyro.sample("n", dist.Poisson(torch.tensor(3.0).double()), obs=torch.tensor(2.0).double())
    mixture(x)


def vae():
    found = VAE()
    return found.model, found.guide


def pair_of(programs):
    return programs.model, programs.guide


#: name -> model, guide and arguments, and further settings
PROGRAMS = {
    "vae": lambda: ((*vae(), X), {"num_samples": 45}),
    "global latent": lambda: (pair_of(GlobalNormal(X, exact_guide=False)), {}),
    "enumerated": lambda: ((mixture, None, X), {}),
    "wider guide": lambda: (pair_of(NormalNormal(X)), {"proposal_scale": 1.5}),
    "minibatch": lambda: (pair_of(NormalNormal(X, subsample_size=2)), {}),
    "rows in blocks": lambda: (
        pair_of(NormalNormal(X, subsample_size=2)),
        {"data_plate": "data", "batch_size": 2},
    ),
    "loader": lambda: (vae(), {"data_loader": X.split(2)}),
    "loader and outer terms": lambda: ((with_outer_terms, None), {"data_loader": X.split(2)}),
    "one draw at once": lambda: ((*vae(), X), {"chunk_size": 1, "num_samples": 8}),
}


def estimate(*args, seed=1, **settings):
    pyro.set_rng_seed(seed)
    return estimate_evidence(*args, **{**SETTINGS, **settings})


def graphs():
    """The graphs of the last call."""
    return compiled_weights._KEPT[-1].capture_report()


def assert_equal(found, expected):
    for name in ("log_evidence", "std_error", "ess", "pareto_k", "jackknife"):
        values = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (found.outer, found.num_samples) == (expected.outer, expected.num_samples)


@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_seeds_give_equal_results(name):
    args, settings = PROGRAMS[name]()
    estimate(*args, **{**settings, "compile": False})  # makes parameters
    for seed in (1, 2):  # the second call finds the graphs of the first one
        expected = estimate(*args, seed=seed, **{**settings, "compile": False})
        assert_equal(estimate(*args, seed=seed, **settings), expected)
    assert graphs().graphs
    assert graphs().num_eager_steps < graphs().num_steps


@pytest.mark.long
def test_the_compiler_gives_the_results_without_it():
    args = *vae(), X
    expected, found = (estimate(*args, compile=chosen) for chosen in (False, True))
    assert_equal(found, expected)


def test_blocks_of_equal_shapes_share_a_graph():
    estimate(*vae(), data_loader=X.repeat(3).split(2), num_samples=60)
    report = graphs()
    # There are 7 blocks of 2 rows, one of 1 row, and 6 chunks of each.
    assert [graph.num_runs for graph in report.graphs] == [40, 5]
    assert (report.num_steps, report.num_eager_steps) == (48, 3)


def test_random_numbers_continue_as_without_graphs():
    states = []
    for chosen in (False, "eager"):
        estimate(*pair_of(NormalNormal(X)), compile=chosen)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_program_without_a_graph_runs_without_it():
    def model():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, random.choice([1.0])), obs=X[0])

    expected = estimate(model, compile=False)
    for _ in range(2):
        with pytest.warns(UserWarning, match="estimate_evidence takes eager steps") as caught:
            found = estimate(model)
        assert len(caught) == 1
        assert_equal(found, expected)


def bad_after(limit, bad):
    """A model whose third data point has a bad weight for rare draws."""

    def model():
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            wrong = torch.tensor([0.0, 0.0, bad, 0.0, 0.0])
            pyro.factor("f", torch.where(z.abs() > limit, wrong, 0 * z))

    return model


@pytest.mark.parametrize("chosen", [False, "eager"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            math.nan,
            r"a log weight for data points \[2\] \(of 5\) is nan\. .* site 'f' of the model",
        ),
        (math.inf, r"a log weight for data points \[2\] \(of 5\) is inf"),
    ],
)
def test_a_bad_weight_names_its_site_and_stays_out_of_the_state(bad, message, chosen):
    model = bad_after(2.8, bad)  # the seed gives no such draw in the first 40
    state = EvidenceState()
    with pyro.validation_enabled(False):
        estimate(model, seed=2, num_samples=40, state=state, compile=chosen)
        with pytest.raises(ValueError, match=message):
            estimate(model, seed=2, num_samples=1000, state=state, compile=chosen)
    assert state.blocks[0].num_samples >= 40
    assert state.blocks[0].to_evidence(()).log_evidence.isfinite().all()


def test_weights_that_are_all_zero_name_the_data_points():
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r"all 40 weights are zero for data points \[2\] \(of 5\)"),
    ):
        estimate(bad_after(-1.0, -math.inf))


@pytest.mark.usefixtures("python_handles_interrupts")
def test_an_interrupt_keeps_the_draws_so_far():
    programs, state = NormalNormal(X), EvidenceState()
    expected = estimate(*pair_of(programs), compile=False, num_samples=60)
    with pytest.warns(UserWarning, match="interrupted"):
        estimate(
            Interrupted(programs.model, 4),
            programs.guide,
            num_samples=60,
            state=state,
            compile=False,
        )
    assert 0 < state.blocks[0].num_samples < 60
    state.programs = {}
    found = estimate(*pair_of(programs), num_samples=60, state=state)
    assert_equal(found, expected)


@pytest.mark.parametrize("chosen", [False, "eager"])
def test_the_host_waits_for_values_at_the_end_only(chosen, monkeypatch):
    """The graph has no audits after its first chunk."""
    monkeypatch.setattr(unread_chunks, "_MOST_SECONDS", math.inf)
    args = *vae(), X
    syncs = []
    with pyro.validation_enabled(False):
        estimate(*args, compile=chosen)
        for num_samples in (60, 120):
            counter = CountingMode(X.device)
            for graph in compiled_weights._KEPT[-1]._graphs._by_key.values() if chosen else ():
                graph[0].audit_times._num_left = 1000
            with counter:
                estimate(*args, num_samples=num_samples, compile=chosen)
            syncs.append(counter.syncs.total())
    assert syncs[0] == syncs[1]
