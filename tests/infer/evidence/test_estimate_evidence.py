import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_ext.infer import estimate_evidence
from pyro_ext.ops import jackknife, pareto_k
from tests.models import GlobalNormal, Interrupted, NormalNormal
from tests.statistics import assert_mean

X = torch.tensor([0.3, -1.9, 2.4, -0.2], dtype=torch.float64)


def test_exact_posterior_has_no_error():
    programs = NormalNormal(X, exact_guide=True)
    found = estimate_evidence(
        programs.model, programs.guide, num_samples=150, jackknife_orders=(0, 1, 2)
    )
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())
    torch.testing.assert_close(found.std_error, torch.zeros_like(X), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.ess, torch.full_like(X, 150))
    assert list(found.jackknife) == [0, 1, 2]
    for estimate in found.jackknife.values():
        torch.testing.assert_close(estimate, programs.log_evidence())
    assert found.num_samples == 150
    assert found.outer == 0


@pytest.mark.long
def test_estimates_lie_within_their_standard_errors():
    programs = NormalNormal(X.repeat(200))
    found = estimate_evidence(programs.model, programs.guide, num_samples=400, max_plate_nesting=1)
    error = (found.log_evidence - programs.log_evidence()).reshape(200, 4)
    z = error / found.std_error.reshape(200, 4)
    # Small, light-tailed weights at x near zero: there the delta method is accurate.
    assert 0.8 < z[:, [0, 3]].std() < 1.25
    assert_mean(error.exp(), 1.0)  # the estimate of p(x) itself is unbiased


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 7, 100, 1000])
def test_summary_statistics_do_not_depend_on_the_chunks(chunk_size):
    programs = NormalNormal(X)
    found = estimate_evidence(
        programs.model, programs.guide, num_samples=100, chunk_size=chunk_size, max_plate_nesting=1
    )
    reference = estimate_evidence(programs.model, programs.guide, num_samples=20_000)
    error = (found.std_error**2 + reference.std_error**2).sqrt()
    assert ((found.log_evidence - reference.log_evidence).abs() < 5 * error).all()
    assert found.log_evidence.shape == (4,)


def test_formulas():
    log_w = torch.tensor([[0.0, 3.0], [1.0, -2.0], [0.5, 0.0]], dtype=torch.float64)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.factor("weight", log_w + 0 * z)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))

    with pyro.validation_enabled(False):  # the model has the weights of three particles
        found = estimate_evidence(
            model, guide, num_samples=3, jackknife_orders=(1, 2), max_plate_nesting=1
        )
    w = log_w.exp()
    torch.testing.assert_close(found.log_evidence, w.mean(0).log())
    torch.testing.assert_close(found.ess, w.sum(0) ** 2 / (w**2).sum(0))
    delta = ((w**2).mean(0) / w.mean(0) ** 2 - 1) / 3
    torch.testing.assert_close(found.std_error, delta.sqrt())
    torch.testing.assert_close(found.pareto_k, pareto_k(log_w))
    for order in (1, 2):
        torch.testing.assert_close(found.jackknife[order], jackknife(log_w, order))
    bits = -w.mean(0).log() / math.log(2) / 64
    torch.testing.assert_close(found.bits_per_dim(64), bits)
    with pytest.raises(ValueError, match="num_dims must be at least 1, but it is 0"):
        found.bits_per_dim(0)


def test_accumulates_in_float64():
    programs = NormalNormal(X.float() + 1000)
    with pytest.warns(UserWarning, match="Pareto k is above 0.7 for data points"):
        found = estimate_evidence(programs.model, programs.guide, num_samples=300)
    for value in (found.log_evidence, found.std_error, found.ess, found.pareto_k):
        assert value.dtype == torch.float64
        assert not value.isnan().any()


def test_a_global_latent_gives_one_joint_estimate():
    programs = GlobalNormal(X)
    with pytest.warns(UserWarning, match="one weight for the whole plate"):
        found = estimate_evidence(programs.model, programs.guide, num_samples=10)
    assert found.log_evidence.shape == ()
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_a_subsampled_global_model_is_refused_whatever_the_chunks(chunk_size):
    programs = GlobalNormal(X, subsample_size=2)
    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\)"):
        estimate_evidence(programs.model, programs.guide, num_samples=5, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_share_the_minibatch(chunk_size):
    programs = NormalNormal(X, subsample_size=2, exact_guide=True)
    found = estimate_evidence(programs.model, programs.guide, num_samples=10, chunk_size=chunk_size)
    assert found.log_evidence.shape == (2,)
    assert (found.std_error < 1e-10).all()


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_terms_outside_the_plates_are_reported(chunk_size):
    programs = NormalNormal(X, exact_guide=True)

    def model():
        pyro.factor("constant", torch.tensor(-2.5))
        programs.model()

    found = estimate_evidence(model, programs.guide, num_samples=8, chunk_size=chunk_size)
    assert found.outer == pytest.approx(-2.5)
    torch.testing.assert_close(found.log_evidence, programs.log_evidence())

    def joint_model():
        pyro.factor("constant", torch.tensor(-2.5))
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def joint_guide():
        pyro.sample("z", dist.Normal(X[0] / 2, math.sqrt(0.5)))

    found = estimate_evidence(joint_model, joint_guide, num_samples=8, chunk_size=chunk_size)
    assert found.outer == 0
    assert found.log_evidence == pytest.approx(programs.log_evidence()[0].item() - 2.5)


def test_arguments_reach_both_programs_and_nothing_is_differentiated():
    scale = torch.tensor(1.0, requires_grad=True)

    def model(x, *, loc):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, *, loc):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + (x - loc) / 2, math.sqrt(0.5)))

    found = estimate_evidence(model, guide, X, loc=2.0, num_samples=5)
    assert not found.log_evidence.requires_grad
    expected = dist.Normal(2.0, math.sqrt(2)).log_prob(X)
    torch.testing.assert_close(found.log_evidence, expected)


@pytest.mark.parametrize(
    ("num_samples", "chunk_size"), [(1, None), (1, 1), (101, 100), (7, 3), (5, 1)]
)
def test_any_number_of_draws(num_samples, chunk_size):
    programs = NormalNormal(X, exact_guide=True)

    def model():
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        # Independent of z, though made from it: the chunks have to agree on that.
        pyro.sample("y", dist.Normal(z.new_zeros(()), 1.0), obs=X.new_tensor(0.5))

    found = estimate_evidence(
        model,
        programs.guide,
        num_samples=num_samples,
        chunk_size=chunk_size,
        jackknife_orders=(),
    )
    constant = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)).item()
    total = found.log_evidence.sum().item() + found.outer
    assert total == pytest.approx(programs.log_evidence().sum().item() + constant)
    assert found.num_samples == num_samples
    assert found.std_error.isnan().all() == (num_samples == 1)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_guide_at_one_point_is_warned_of(chunk_size):
    programs = NormalNormal(X)

    def guide():
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Delta(X / 2))

    with pytest.warns(UserWarning, match="puts site 'z' at one point"):
        estimate_evidence(programs.model, guide, num_samples=8, chunk_size=chunk_size)

    automatic = AutoNormal(programs.model)  # its Deltas are functions of draws
    estimate_evidence(programs.model, automatic, num_samples=8, chunk_size=chunk_size)


def test_repr_and_copies():
    programs = NormalNormal(X)
    found = estimate_evidence(programs.model, programs.guide)
    text = repr(found)
    for part in ("4 data points", "1000 draws", "+-", "nats", "jackknife 1", "Pareto k"):
        assert part in text
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        torch.testing.assert_close(twin.log_evidence, found.log_evidence)


def test_repr_shows_what_lies_outside_and_what_is_missing():
    programs = NormalNormal(X)

    def model():
        pyro.factor("constant", torch.tensor(-2.5))
        programs.model()

    text = repr(estimate_evidence(model, programs.guide, num_samples=10))
    assert "outer          -2.5000" in text
    assert "Pareto k       needs 21 draws" in text


def test_progress_bar_is_off_by_default(capsys):
    programs = NormalNormal(X)
    estimate_evidence(programs.model, programs.guide, max_plate_nesting=1)
    assert capsys.readouterr().err == ""
    estimate_evidence(programs.model, programs.guide, max_plate_nesting=1, progress_bar=True)
    assert "estimate_evidence: 100%" in capsys.readouterr().err


@pytest.mark.long
def test_high_orders_are_taken_over_blocks():
    programs = NormalNormal(X)
    found = estimate_evidence(programs.model, programs.guide, jackknife_orders=(3, 5))
    for estimate in found.jackknife.values():
        assert ((estimate - programs.log_evidence()).abs() < 5 * found.std_error).all()


def test_totals():
    programs = NormalNormal(X)

    def model():
        pyro.factor("constant", torch.tensor(-2.5))
        programs.model()

    found = estimate_evidence(model, programs.guide, num_samples=100)
    assert found.total == pytest.approx(found.log_evidence.sum().item() - 2.5)
    assert found.total_std_error == pytest.approx(found.std_error.square().sum().sqrt().item())


def test_the_prior_as_proposal():
    programs = NormalNormal(X)

    def model(scale):
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, scale), obs=X)

    found = estimate_evidence(model, None, 1.0, num_samples=20_000)
    z = (found.log_evidence - programs.log_evidence()) / found.std_error
    assert (z.abs() < 4.5).all()


@pytest.mark.long
def test_stops_at_the_target():
    programs = NormalNormal(X)
    options = {"num_samples": 5000, "chunk_size": 50, "jackknife_orders": (1, 3)}
    found = estimate_evidence(programs.model, programs.guide, target_std_error=0.08, **options)
    assert 100 <= found.num_samples < 5000
    assert found.std_error.max() <= 0.08
    everything = estimate_evidence(programs.model, programs.guide, target_std_error=0.0, **options)
    assert everything.num_samples == 5000


def test_an_interrupt_returns_what_there_is():
    programs = NormalNormal(X)
    options = {"num_samples": 500, "chunk_size": 50, "max_plate_nesting": 1}
    with pytest.warns(UserWarning, match=r"interrupted\. The result uses \d+ of 500 draws"):
        found = estimate_evidence(Interrupted(programs.model, 6), programs.guide, **options)
    assert 50 <= found.num_samples < 500
    assert found.log_evidence.isfinite().all()
    with pytest.raises(KeyboardInterrupt):
        estimate_evidence(Interrupted(programs.model, 0), programs.guide, **options)


def test_weights_of_zero_and_nan_name_the_data_points():
    programs = NormalNormal(X)

    for bad, message in (
        (-math.inf, r"weights are zero for data points \[2\] \(of 4\)"),
        (math.inf, r"a log weight for data points \[2\] \(of 4\) is inf"),
        (math.nan, r"a log weight for data points \[2\] \(of 4\)"),
    ):

        def model(bad=bad):
            with pyro.plate("data", len(X)):
                z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
                pyro.factor("f", torch.tensor([0.0, 0.0, bad, 0.0]) + 0 * z)

        with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
            estimate_evidence(model, programs.guide, num_samples=20)


def test_a_narrow_guide_is_warned_of():
    def guide():
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(X / 2, 0.1))

    with pytest.warns(UserWarning, match=r"above 0\.7 for data points \[.*\] \(of 4\)\. .*Widen"):
        found = estimate_evidence(NormalNormal(X).model, guide, num_samples=5000)
    assert (found.pareto_k > 0.7).any()
