"""Evidence over the rows of a plate or the batches of a loader, and runs that go on."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext.infer import EvidenceState, estimate_evidence
from pyro_ext.infer.evidence.proposals import WidenedScales
from tests.models import GlobalNormal, Interrupted, NormalNormal

X = torch.linspace(-2, 3, 10, dtype=torch.float64)
ROWS = {"data_plate": "data", "batch_size": 4}


class Counted(NormalNormal):
    """Counts the rows that the model sees, and has terms outside of the common plates."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows = []

    def model(self):
        pyro.factor("constant", torch.tensor(-2.5))
        with self.plate() as index:
            z = pyro.sample("z", dist.Normal(self.x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pyro.subsample(self.x, event_dim=0))
            self.rows.append(index.tolist())


@pytest.mark.long
@pytest.mark.parametrize("subsample_size", [None, 4])
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_every_row_once(subsample_size, chunk_size):
    programs = Counted(X, subsample_size=subsample_size, exact_guide=True)
    found = estimate_evidence(
        programs.model, programs.guide, num_samples=25, chunk_size=chunk_size, **ROWS
    )
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())
    assert found.outer == pytest.approx(-2.5)
    assert found.total == pytest.approx(programs.log_evidence().sum().item() - 2.5)
    assert found.plates == ("data",)
    last = [8, 9] if subsample_size is None else [6, 7, 8, 9]
    assert programs.rows[-1] == last
    for estimate in (found.ess, found.pareto_k, found.jackknife[1], found.history.std_error[-1]):
        assert estimate.shape == (10,)


@pytest.mark.long
def test_blocks_estimate_what_the_whole_does():
    programs = NormalNormal(X)
    found = estimate_evidence(programs.model, programs.guide, num_samples=4000, **ROWS)
    z = (found.log_evidence - programs.log_evidence()) / found.std_error
    assert (z.abs() < 5).all()
    assert found.history.num_samples == (*(2**i for i in range(12)), 4000)


@pytest.mark.parametrize("dim", [-1, -2])
def test_two_plates(dim):
    data = torch.randn(3, 10) if dim == -1 else torch.randn(10, 3)

    def plates():
        rows = pyro.plate("data", 10, dim=dim)
        return rows, pyro.plate("other", 3, dim=-3 - dim)

    def model():
        rows, others = plates()
        with rows as index, others:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data.index_select(dim, index))
        with rows:
            pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=torch.tensor(0.5))

    def guide():
        rows, others = plates()
        with rows as index, others:
            pyro.sample("z", dist.Normal(data.index_select(dim, index) / 2, math.sqrt(0.5)))

    found = estimate_evidence(model, guide, num_samples=10, **ROWS)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(data)
    torch.testing.assert_close(found.log_evidence, exact.double(), rtol=1e-5, atol=1e-5)
    outer = 10 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)).item()
    assert found.outer == pytest.approx(outer, rel=1e-5)
    assert found.plates == (("other", "data") if dim == -1 else ("data", "other"))


def model_of(x, scale=1.0):
    pyro.factor("constant", torch.tensor(-2.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def guide_of(x, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X), batch_size=4),
        list(X.split(4)),
        [{"x": x} for x in X.split(4)],
        (x for x in X.split(4)),
    ],
)
def test_batches_of_a_loader(loader):
    found = estimate_evidence(model_of, guide_of, data_loader=loader, num_samples=10)
    torch.testing.assert_close(found.log_evidence, NormalNormal(X).log_evidence())
    assert found.outer == pytest.approx(-2.5)


def test_arguments_follow_those_of_the_loader():
    found = estimate_evidence(
        model_of, guide_of, 3.0, data_loader=list(X.split(4)), num_samples=2000
    )
    exact = dist.Normal(0.0, math.sqrt(10)).log_prob(X)
    assert ((found.log_evidence - exact).abs() < 5 * found.std_error).all()


def test_automatic_guides_see_blocks_of_rows():
    programs = NormalNormal(X)
    guide = AutoNormal(programs.model)
    guide()
    with pytest.raises(ValueError, match=r"'data' has subsample_size=10, .*An automatic guide"):
        estimate_evidence(programs.model, guide, num_samples=10, **ROWS)
    guide = AutoNormal(programs.model, create_plates=lambda: pyro.plate("data", 10))
    guide()
    found = estimate_evidence(programs.model, guide, num_samples=3000, proposal_scale=8.0, **ROWS)
    assert ((found.log_evidence - programs.log_evidence()).abs() < 5 * found.std_error).all()


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, ROWS], ids=["whole", "blocks"])
@pytest.mark.parametrize("calls", [4, 9, 17])
def test_a_run_that_goes_on_ends_as_if_it_had_not_been_interrupted(options, calls):
    programs = NormalNormal(X)
    options = {"num_samples": 1000, "chunk_size": 50, "jackknife_orders": (1, 2), **options}
    pyro.set_rng_seed(3)
    expected = estimate_evidence(programs.model, programs.guide, **options)
    state = EvidenceState()
    pyro.set_rng_seed(3)
    with pytest.warns(UserWarning, match="interrupted"):
        estimate_evidence(
            Interrupted(programs.model, calls), programs.guide, state=state, **options
        )
    state = pickle.loads(pickle.dumps(state))
    torch.randn(17)
    found = estimate_evidence(programs.model, programs.guide, state=state, **options)
    for name in ("log_evidence", "std_error", "ess", "pareto_k"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    torch.testing.assert_close(found.history.jackknife, expected.history.jackknife, equal_nan=True)
    assert found.history.num_samples == expected.history.num_samples
    never = Interrupted(programs.model, 0)
    again = estimate_evidence(never, programs.guide, state=state, **options)
    torch.testing.assert_close(again.log_evidence, expected.log_evidence)


@pytest.mark.parametrize("options", [{}, ROWS], ids=["whole", "blocks"])
def test_a_complete_run_goes_on_to_more_draws(options):
    programs = NormalNormal(X)
    state = EvidenceState()
    options["state"] = state
    few = estimate_evidence(programs.model, programs.guide, num_samples=100, **options)
    copied = copy.deepcopy(state)
    more = estimate_evidence(programs.model, programs.guide, num_samples=400, **options)
    assert (few.num_samples, more.num_samples) == (100, 400)
    assert (more.std_error < few.std_error).all()
    del options["state"]
    fewer = estimate_evidence(
        programs.model, programs.guide, num_samples=50, state=copied, **options
    )
    torch.testing.assert_close(fewer.log_evidence, few.log_evidence)
    with pytest.raises(ValueError, match=r"the state began with jackknife_orders=\(1,\), but"):
        estimate_evidence(programs.model, programs.guide, jackknife_orders=(), state=state)


def test_runs_that_go_on_share_no_draws_with_others():
    """Neither with a run that followed on the first, nor with one of the same seed."""
    drawn = []

    def model():
        drawn.append(pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0)))
        pyro.sample("x", dist.Normal(drawn[-1], 1.0), obs=X[0])

    options = {"chunk_size": 100, "max_plate_nesting": 0}
    state = EvidenceState()
    estimate_evidence(model, num_samples=100, state=state, **options)
    estimate_evidence(model, num_samples=100, **options)
    pyro.set_rng_seed(0)
    before = torch.get_rng_state()
    estimate_evidence(model, num_samples=200, state=state, **options)
    assert torch.equal(torch.get_rng_state(), before)
    guide_draws = torch.cat([z.flatten() for z in drawn if z.dim()]).view(-1, 2, 100)[:, 0]
    guide_draws = guide_draws.flatten()
    assert len(guide_draws) == 300
    assert len(guide_draws.unique()) == 300


def test_a_call_that_fails_leaves_the_state_open():
    programs = NormalNormal(X)
    state = EvidenceState()
    with pytest.raises(ValueError, match=r"data_plate must be .* but it is 'dat'"):
        estimate_evidence(
            programs.model, programs.guide, data_plate="dat", batch_size=4, state=state
        )
    found = estimate_evidence(programs.model, programs.guide, num_samples=20, state=state, **ROWS)
    assert found.log_evidence.shape == (10,)


def test_no_run_sees_more_rows_than_a_block():
    programs = Counted(X)
    estimate_evidence(programs.model, programs.guide, num_samples=10, **ROWS)
    assert max(map(len, programs.rows)) == 4


def test_an_interrupt_between_blocks_keeps_the_rows_that_are_done():
    programs = NormalNormal(X, exact_guide=True)
    options = {"num_samples": 50, "chunk_size": 50, "max_plate_nesting": 1, **ROWS}
    with pytest.warns(UserWarning, match="50 of 50 draws and 8 data points"):
        found = estimate_evidence(Interrupted(programs.model, 3), programs.guide, **options)
    torch.testing.assert_close(found.log_evidence, programs.log_evidence()[:8])


def test_each_block_stops_at_the_target():
    programs = NormalNormal(X)
    found = estimate_evidence(
        programs.model,
        programs.guide,
        num_samples=4000,
        chunk_size=50,
        target_std_error=0.1,
        **ROWS,
    )
    assert found.std_error.max() <= 0.1
    assert found.num_samples < 4000
    sizes = found.history.num_samples
    assert list(sizes) == sorted(set(sizes))
    torch.testing.assert_close(found.history.log_evidence[-1], found.log_evidence)
    assert found.history.std_error[1:].isfinite().all()


def test_data_points_are_named_across_blocks():
    bad = torch.zeros(10)
    bad[6] = math.nan

    def model(subsample_size=None):
        with pyro.plate("data", 10, subsample_size=subsample_size) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("f", bad[index] + 0 * z)

    def guide(subsample_size=None):
        with pyro.plate("data", 10, subsample_size=subsample_size):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match=r"for data points \[6\] \(of 4 in this block\)"):
            estimate_evidence(model, guide, num_samples=10, **ROWS)
        # The last block goes back over known rows, for a plate with a subsample size.
        bad[6:] = torch.tensor([0.0, 0.0, 0.0, math.nan])
        with pytest.raises(ValueError, match=r"for data points \[9\]") as raised:
            estimate_evidence(model, guide, 4, num_samples=10, **ROWS)
        assert not hasattr(raised.value, "__notes__")
        bad[6:] = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
        with pytest.raises(ValueError, match=r"weights are zero for data points \[6\]"):
            estimate_evidence(model, guide, num_samples=10, **ROWS)


def test_bad_blocks():
    programs = NormalNormal(X)
    pair = (programs.model, programs.guide)
    for options, message in (
        ({"batch_size": 4}, "batch_size=4 needs data_plate"),
        ({"data_plate": "data"}, "data_plate='data' needs batch_size or data_loader"),
        ({"batch_size": 0, "data_plate": "data"}, "batch_size must be"),
        ({"batch_size": 4, "data_plate": "rows"}, r"but it is 'rows'\. Pass one of \['data'\]"),
        ({"data_loader": []}, "data_loader has no batches"),
        ({"num_rows": 10}, "num_rows=10 needs data_loader"),
        ({"num_rows": 0, "data_loader": [X]}, "num_rows must be at least 1"),
        (
            {"data_loader": [X], "batch_size": 4, "data_plate": "data"},
            "batch_size=4 and data_loader were both given",
        ),
        ({"proposal_scale": 0.0}, "proposal_scale must be positive and finite"),
        ({"proposal_scale": math.nan}, "proposal_scale must be positive and finite, but it is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_evidence(*pair, num_samples=10, **options)
    with pytest.raises(TypeError, match=r"data_loader must be an iterable of batches, .* 3"):
        estimate_evidence(*pair, data_loader=3)
    other = NormalNormal(X, subsample_size=5)
    with pytest.raises(ValueError, match=r"has subsample_size=5, .* subsample_size=4 or none"):
        estimate_evidence(other.model, other.guide, num_samples=10, **ROWS)

    def model():
        with pyro.plate("data", 10, subsample=torch.arange(3)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match="'data' has rows of its own"):
        estimate_evidence(model, num_samples=10, **ROWS)

    def does_not_index():
        with pyro.plate("data", 10):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    with pytest.raises((ValueError, RuntimeError)) as raised:
        estimate_evidence(does_not_index, num_samples=10, **ROWS)
    assert any("must index their data" in note for note in raised.value.__notes__)

    joint = GlobalNormal(X)
    with pytest.raises(
        ValueError, match=r"each row has its own weights, .* no such plate|subsampled"
    ):
        estimate_evidence(joint.model, joint.guide, num_samples=10, **ROWS)


@pytest.mark.parametrize(
    ("fn", "widened"),
    [
        (dist.Normal(0.5, 2.0), dist.Normal(0.5, 3.0)),
        (dist.StudentT(4.0, 0.5, 2.0), dist.StudentT(4.0, 0.5, 3.0)),
        (dist.Laplace(0.5, 2.0), dist.Laplace(0.5, 3.0)),
        (dist.LogNormal(0.5, 2.0), dist.LogNormal(0.5, 3.0)),
        (
            dist.Normal(torch.zeros(3), 2.0).to_event(1),
            dist.Normal(torch.zeros(3), 3.0).to_event(1),
        ),
        (dist.Normal(0.5, 2.0).mask(torch.tensor(True)), dist.Normal(0.5, 3.0)),
        (
            dist.MultivariateNormal(torch.ones(2), 4 * torch.eye(2)),
            dist.MultivariateNormal(torch.ones(2), 9 * torch.eye(2)),
        ),
        (
            dist.LowRankMultivariateNormal(torch.ones(2), torch.ones(2, 1), torch.ones(2)),
            dist.MultivariateNormal(torch.ones(2), 2.25 * (torch.ones(2, 2) + torch.eye(2))),
        ),
        (
            dist.TransformedDistribution(
                dist.Normal(0.0, 2.0), [dist.transforms.SigmoidTransform()]
            ),
            dist.TransformedDistribution(
                dist.Normal(0.0, 3.0), [dist.transforms.SigmoidTransform()]
            ),
        ),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_widened_proposals(fn, widened):
    proposal = WidenedScales(1.5)(lambda: pyro.sample("z", fn))
    site = pyro.poutine.trace(proposal).get_trace().nodes["z"]
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), widened.log_prob(site["value"]))


@pytest.mark.parametrize("auto_guide", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides_are_widened(auto_guide):
    x = torch.tensor(1.0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    narrow = auto_guide(model, init_scale=0.2)
    with pytest.warns(UserWarning, match=r"proposal_scale=1\.5"):
        estimate_evidence(model, narrow, num_samples=3000)
    found = estimate_evidence(model, narrow, num_samples=3000, proposal_scale=5.0)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    assert (found.log_evidence - exact).abs() < 5 * found.std_error
    assert found.pareto_k < 0.7


def test_sites_without_a_scale_are_refused():
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=torch.tensor(3.0))

    with pytest.raises(
        ValueError, match=r"cannot widen guide site 'rate', because G\w+ is not a location-scale"
    ):
        estimate_evidence(model, num_samples=10, proposal_scale=2.0)
