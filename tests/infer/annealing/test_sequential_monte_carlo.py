import copy
import math
import pickle
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import planar
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import init_to_value

from pyro_ext.diagnostics import from_pyro_svi
from pyro_ext.infer import annealed_importance_sampling, sequential_monte_carlo
from tests.models import Interrupted
from tests.statistics import assert_mean

FEW = {"num_particles": 64, "num_runs": 8}
ROWS = torch.randn(30, 3, generator=torch.Generator().manual_seed(1)).double()
ROWS = ROWS + ROWS[:, :1]
Y = ROWS.sum(1) + 0.5 * torch.randn(30, generator=torch.Generator().manual_seed(2)).double()
X = torch.tensor([0.3, -1.9, 2.4], dtype=torch.float64)


def regression(*_):
    """Three correlated coefficients, which all rows share."""
    slope = pyro.sample("slope", dist.Normal(ROWS.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(Y)):
        mean = (slope * ROWS).sum(-1)
        pyro.sample("y", dist.Normal(mean, 0.5), obs=Y)


COVARIANCE = torch.linalg.inv(ROWS.T @ ROWS / 0.25 + torch.eye(3))
EXACT = dist.MultivariateNormal(
    torch.zeros(30).double(), 0.25 * torch.eye(30) + ROWS @ ROWS.T
).log_prob(Y)


def local_normal(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.3), obs=x)


def two_modes():
    """A broad prior, and a likelihood with a part near -3 and a part near 3."""
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 3.0))
    near, far = (dist.Normal(loc, 0.5).log_prob(z) for loc in (-3.0, 3.0))
    pyro.factor("two", torch.logaddexp(near, far))


TWO_MODES = math.log(2) + dist.Normal(0.0, 9.25**0.5).log_prob(torch.tensor(3.0)).item()


def one_mode():
    pyro.sample("z", dist.Normal(torch.tensor(-3.0).double(), 0.5))


def z_score(evidence, exact):
    return ((evidence.log_evidence - exact) / evidence.std_error).abs().max()


def test_a_correlated_posterior_that_all_rows_share():
    found = sequential_monte_carlo(regression)
    assert z_score(found.evidence, EXACT) < 4.5
    assert found.evidence.std_error < 0.2
    assert found.evidence.flags == {}
    slope = found.draws["slope"]
    assert slope.shape == (16, 256, 3)
    mean = COVARIANCE @ ROWS.T @ Y / 0.25
    assert_mean(slope.mean(1), mean)
    spread = (slope - mean).flatten(0, 1)
    assert torch.allclose(spread.T @ spread / len(spread), COVARIANCE, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize(
    "guide", [None, AutoNormal(local_normal, init_scale=1.0)], ids=["prior", "guide"]
)
def test_data_points_have_evidences_of_their_own(guide):
    evidence = sequential_monte_carlo(local_normal, guide, X).evidence
    assert evidence.plates == ("data",)
    assert z_score(evidence, dist.Normal(0.0, 1.09**0.5).log_prob(X)) < 4.5
    assert (evidence.temperatures[-1] == 1).all()
    assert len(evidence.temperatures[:, 0].unique()) > 1
    assert (evidence.other is None) == (guide is None)
    assert evidence.flags == {}


@pytest.mark.slow
def test_the_evidence_of_few_particles_is_unbiased():
    found = [
        sequential_monte_carlo(regression, num_particles=16, chain_length=4, num_runs=50)
        for _ in range(40)
    ]
    ratio = torch.stack([(run.evidence.by_run - EXACT).exp().mean() for run in found])
    assert_mean(ratio, 1.0)


@pytest.mark.slow
def test_errors_are_reported():
    found = [sequential_monte_carlo(regression, **FEW | {"num_runs": 16}) for _ in range(40)]
    z = torch.stack([z_score(run.evidence, EXACT) for run in found])
    # Student's t with 15 degrees of freedom has variance 15 / 13.
    assert 0.5 < z.square().mean() < 2


def simplex():
    probs = pyro.sample("probs", dist.Dirichlet(torch.tensor([1.5, 1.0, 2.0]).double()))
    counts = torch.tensor([3.0, 4.0, 2.0]).double()
    pyro.sample("x", dist.Multinomial(probs=probs, total_count=9), obs=counts)


def rate():
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 0.5))
    pyro.sample("x", dist.Poisson(rate), obs=torch.tensor(9.0).double())


def components():
    """A component that is summed out, given a location."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0).double(), 2.0))
    sign = pyro.sample(
        "sign", dist.Bernoulli(torch.tensor(0.3).double()), infer={"enumerate": "parallel"}
    )
    pyro.sample("x", dist.Normal(loc * (2 * sign - 1), 1.0), obs=torch.tensor(1.5).double())


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (
            simplex,
            dist.DirichletMultinomial(torch.tensor([1.5, 1.0, 2.0]), total_count=9).log_prob(
                torch.tensor([3.0, 4.0, 2.0])
            ),
        ),
        (rate, dist.NegativeBinomial(2.0, torch.tensor(1 / 1.5)).log_prob(torch.tensor(9.0))),
        (components, dist.Normal(0.0, 5**0.5).log_prob(torch.tensor(1.5))),
        (two_modes, TWO_MODES),
    ],
)
def test_other_supports_and_sums(model, exact):
    found = sequential_monte_carlo(model)
    assert z_score(found.evidence, exact) < 4.5
    assert found.evidence.flags == {}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*(prior|Pareto k)")
def test_a_guide_that_misses_a_mode_is_flagged():
    options = {"num_temperatures": 20, "check_prior": True}
    annealed = annealed_importance_sampling(two_modes, one_mode, **options)
    sequential = sequential_monte_carlo(two_modes, one_mode, **FEW).evidence
    for found in (annealed, sequential.other):
        assert abs(found.log_evidence - (TWO_MODES - math.log(2))) < 0.1
    assert (sequential.start, sequential.other.start) == ("prior", "guide")
    assert z_score(sequential, TWO_MODES) < 4.5
    for found in (annealed, sequential):
        assert "The guide misses a part of the posterior" in found.flags["prior"]
        assert "misses a part" in repr(found)


@pytest.mark.long
def test_a_guide_is_the_start_if_its_error_is_much_smaller():
    def guide(scale):
        mean = COVARIANCE @ ROWS.T @ Y / 0.25
        pyro.sample("slope", dist.MultivariateNormal(mean, scale * COVARIANCE))

    starts = set()
    for scale in (0.1, 1.1, 1.1, 1.1):
        evidence = sequential_monte_carlo(regression, guide, scale, **FEW).evidence
        starts.add((scale, evidence.start))
        assert f"(from the {evidence.start})" in repr(evidence)
        pair = (evidence, evidence.other)
        from_guide, from_prior = pair if evidence.start == "guide" else pair[::-1]
        gain = from_prior.log_evidence - from_guide.log_evidence
        is_precise = from_guide.std_error <= 0.5 * from_prior.std_error
        is_close = gain <= 2 * torch.hypot(from_guide.std_error, from_prior.std_error)
        assert (evidence.start == "guide") == (is_precise and is_close)
        assert len(from_prior.by_run) in (FEW["num_runs"], 2 * FEW["num_runs"])
        assert z_score(evidence, EXACT) < 4.5
    assert {(0.1, "prior"), (1.1, "guide")} <= starts


def test_each_start_is_flagged_for_what_the_other_one_misses():
    guide = AutoNormal(local_normal, init_scale=1.0)
    evidence = sequential_monte_carlo(local_normal, guide, X, **FEW).evidence
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for start, more, names in (
        ("guide", first, {"prior"}),
        ("guide", -first, set()),
        ("prior", first, {"guide"}),
        ("prior", -first, {"prior"}),
    ):
        other = replace(evidence, log_evidence=evidence.log_evidence + more)
        flags = replace(evidence, start=start, other=other).flags
        assert set(flags) == names
        assert all("data points [0] (of 3)" in reason for reason in flags.values())


def test_draws_are_exported_to_arviz():
    found = sequential_monte_carlo(simplex, **FEW)
    exported = from_pyro_svi(simplex, found)
    values = torch.tensor(exported.posterior["probs"].values)
    assert torch.allclose(values.sort(1).values, found.draws["probs"].sort(1).values)
    assert set(exported.sample_stats) == {"log_p"}
    assert exported.posterior.attrs["sampling"] == "sequential Monte Carlo"
    x = X[:2]
    found = sequential_monte_carlo(local_normal, None, x, **FEW)
    exported = from_pyro_svi(local_normal, found, x, num_samples=10)
    assert exported.posterior["z"].shape == (8, 10, 2)
    assert exported.log_likelihood["x"].dims == ("chain", "draw", "data")


def test_a_seed_repeats_the_result_which_can_be_copied_and_plotted():
    pytest.importorskip("matplotlib")
    found = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        found.append(sequential_monte_carlo(regression, **FEW))
    assert torch.equal(found[0].draws["slope"], found[1].draws["slope"])
    for copied in (copy.deepcopy(found[0]), pickle.loads(pickle.dumps(found[0]))):
        assert torch.equal(copied.evidence.by_run, found[0].evidence.by_run)
    size = len(found[0].evidence.temperatures)
    ax = found[0].evidence.plot_temperatures()
    assert [len(line.get_xdata()) for line in ax.lines] == [size] * 4
    assert found[0].evidence.to_dataset()["run_ess"].dims == ("temperature", "run")
    assert "temperatures" in repr(found[0])


def test_a_chunk_does_not_change_the_result():
    found = []
    for chunk_size in (None, 100):
        pyro.set_rng_seed(1)
        found.append(sequential_monte_carlo(rate, chunk_size=chunk_size, **FEW).evidence)
    # A chunk draws its own numbers at the start.
    error = (found[0].std_error.square() + found[1].std_error.square()).sqrt()
    assert (found[0].log_evidence - found[1].log_evidence).abs() < 4.5 * error


def correlated(scale):
    """A correlation that may leave [-1, 1], where the covariance is singular."""
    r = pyro.sample("r", dist.Normal(torch.tensor(0.0).double(), scale))
    covariance = torch.eye(2).double() + r[..., None, None] * torch.eye(2).double().flip(0)
    x = torch.tensor([1.0, -0.5]).double()
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(2).double(), covariance), obs=x)


def near_zero(scale):
    pyro.sample("r", dist.Normal(torch.tensor(0.0).double(), 0.2))


def test_singular_matrices_are_rejected():
    r = torch.linspace(-1, 1, 20_001).double()[1:-1]
    covariance = torch.eye(2) + r[:, None, None] * torch.eye(2).flip(0)
    x = torch.tensor([1.0, -0.5]).double()
    likelihood = dist.MultivariateNormal(torch.zeros(2).double(), covariance).log_prob(x).exp()
    exact = torch.trapezoid(likelihood * dist.Normal(0.0, 0.4).log_prob(r).exp(), r).log()
    options = {"check_prior": False, "num_particles": 512}
    evidence = sequential_monte_carlo(correlated, near_zero, 0.4, **options).evidence
    assert z_score(evidence, exact) < 4.5
    with pytest.raises(ValueError, match=r"a matrix is singular at one of .* draws .* diagonal"):
        sequential_monte_carlo(correlated, None, 2.0)


def test_draws_at_the_edge_of_their_support_are_warned_of():
    def model(dtype, concentration):
        of_beta = torch.full((2,), concentration, dtype=dtype)
        r = pyro.sample("r", dist.Beta(*of_beta))
        pyro.sample("x", dist.Binomial(10, r), obs=of_beta[0] * 0 + 9)

    with pytest.warns(UserWarning, match=r"of the draws of site 'r' are too close to the edge"):
        sequential_monte_carlo(model, None, torch.float32, 0.1, **FEW)
    sequential_monte_carlo(model, None, torch.float64, 0.5, **FEW)


def without_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))


def discrete():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def improper():
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def with_nan():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal((z - 1).sqrt(), 1.0, validate_args=False), obs=torch.tensor(0.5))


def impossible():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("never", torch.full_like(z, -math.inf))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(
    ("model", "guide", "options", "words"),
    [
        (without_latents, None, {}, "draws no latent site"),
        (discrete, None, {}, "site 'z' .* is discrete"),
        (with_nan, None, {}, "log-probability of site 'x' of the model is NaN"),
        (impossible, None, {}, "draws of the guide, .* have density zero"),
        (regression, AutoDelta(regression), {}, "only points"),
        (regression, None, {"num_particles": 30}, "multiple of chain_length, 8"),
        (regression, None, {"num_particles": 8}, "at least twice as large"),
        (regression, None, {"num_runs": 3}, "num_runs must be at least 4"),
        (regression, None, {"target_ess": 1.0}, "target_ess must be"),
    ],
)
def test_bad_input(model, guide, options, words):
    with pytest.raises((ValueError, TypeError), match=f"(?s)sequential_monte_carlo.*{words}"):
        sequential_monte_carlo(model, guide, **options)


def test_an_improper_prior_is_no_start():
    with pytest.raises(ValueError, match=r"site 'z' is improper.* Pass a guide"):
        sequential_monte_carlo(improper)


def test_a_flow_without_an_inverse_is_refused():
    guide = AutoNormalizingFlow(regression, planar)
    with pytest.raises(ValueError, match=r"a transform without an inverse.* Leave the guide out"):
        sequential_monte_carlo(regression, guide, **FEW)


def test_a_guide_is_not_compared_with_an_improper_prior():
    start = init_to_value(values={"z": torch.tensor(0.0)})
    guide = AutoMultivariateNormal(improper, init_loc_fn=start, init_scale=2.0)
    evidence = sequential_monte_carlo(improper, guide, **FEW).evidence
    assert z_score(evidence, 0.0) < 4.5  # a normal density, integrated over its location
    assert evidence.other is None
    assert evidence.start == "guide"


@pytest.mark.long
def test_an_interrupt_keeps_the_first_pass():
    found = []
    counted = Interrupted(regression, 10**6)
    sequential_monte_carlo(counted, **FEW)
    for after in (5, 10**6 - counted.calls - 50):
        interrupted = Interrupted(regression, after)
        try:
            with pytest.warns(UserWarning, match="interrupted.* the 4 runs of the first pass"):
                found.append(sequential_monte_carlo(interrupted, **FEW))
        except KeyboardInterrupt:
            found.append(None)
    assert found[0] is None
    assert len(found[1].evidence.by_run) == 4
    assert z_score(found[1].evidence, EXACT) < 10
