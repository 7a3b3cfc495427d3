"""Expectations, annealing, calibration and leave-one-out, divided over processes."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed
from tqdm.auto import tqdm

from pyro_ext._interruption import Interrupts
from pyro_ext._random_states import seed_all
from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo, simulation_based_calibration
from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.distributed.streams import seed_of
from pyro_ext.infer import (
    annealed_importance_sampling,
    estimate_evidence,
    estimate_expectation,
    sequential_monte_carlo,
)
from pyro_ext.infer.annealing.annealer import Annealer
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.temperature_paths import inverse_temperatures
from pyro_ext.infer.annealing.unconstrained import UnconstrainedPrograms
from pyro_ext.tracing import Programs
from tests.distributed.given_draws import InTurns, X, figures, guide, model
from tests.distributed.pool import SIZES

pytestmark = pytest.mark.long

EXACT = dist.Normal(0.0, math.sqrt(2)).log_prob(X)


def expectation_of(options, guide=guide):
    return figures(estimate_expectation(model, guide, X, max_plate_nesting=1, **options))


@pytest.mark.parametrize("size", SIZES)
def test_expectations_are_those_of_one_process_after_the_other(pools, size):
    # With chunks of one draw, no run checks the particle dim.
    options = {"num_samples": 30 * size, "chunk_size": 1}
    expected = expectation_of(options, InTurns(guide, size, checked_call=0))
    assert pools(size).results(expectation_of, options) == [expected] * size


def rare_event():
    def rare_model():
        return (pyro.sample("z", dist.Normal(0.0, 1.0)) > 5).float()

    def rare_guide():
        pyro.sample("z", dist.Normal(5.0, 1.0))

    found = estimate_expectation(rare_model, rare_guide, num_samples=2_007)
    return found.value.item(), found.std_error.item(), found.num_samples


def test_a_rare_event_has_its_probability(pools):
    found = pools(4).results(rare_event)
    assert found == found[:1] * 4
    value, std_error, num_samples = found[0]
    assert num_samples == 2_007
    assert abs(value - 2.866515719e-7) < 4.5 * std_error < 1e-7


def chains_of(options, guide=guide):
    found = annealed_importance_sampling(
        model,
        guide,
        X,
        num_temperatures=8,
        num_leapfrog_steps=2,
        max_plate_nesting=1,
        **options,
    )
    return figures(found)


def chains_one_by_one(size):
    """The mean weights of 16 chains, by one process with the random numbers of each in turn."""
    pyro.set_rng_seed(0)
    seed = int(torch.randint(2**62, ()))
    seed_all(seed_of(seed, "all"))
    target = FlatTarget(UnconstrainedPrograms("", Programs(model, guide, (X,), {}), 1))
    betas = inverse_temperatures("sigmoid", 8)
    call = JointCall("", Interrupts({}))
    annealer = Annealer(target, betas, 2, 0.8, call, tqdm(disable=True))
    annealer.adapt(16)
    found = []
    for rank in range(size):
        seed_all(seed_of(seed, rank))
        found.append(annealer.evidence(16 // size, 16, (), None).log_evidence)
    return torch.stack(found).logsumexp(0) - math.log(size)


@pytest.mark.parametrize("size", SIZES)
def test_chains_are_those_of_one_process_after_the_other(pools, size):
    with torch.no_grad():
        expected = chains_one_by_one(size)
    found = pools(size).results(chains_of, {"num_chains": 16})[0]["log_evidence "][1]
    found = torch.frombuffer(bytearray(found), dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"num_chains": 16},
        {"num_chains": 13, "chunk_size": 2},
        {"num_chains": 2},
        {"num_chains": 16, "exact_sample": {"z": X / 2}},
    ],
    ids=str,
)
def test_chains_are_the_same_in_all_processes(pools, options):
    found = pools(4).results(chains_of, options)
    assert found == found[:1] * 4
    assert found[0]["num_samples "] == options["num_chains"]


def particles_of(num_runs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sequential_monte_carlo: ")  # runs of 16 particles
        found = sequential_monte_carlo(
            model,
            guide,
            X,
            num_particles=16,
            num_runs=num_runs,
            exact_sample={"z": X / 2},
            max_plate_nesting=1,
        )
    return figures(found.evidence) | {"draws": found.draws["z"].tolist()}


@pytest.mark.parametrize("num_runs", [4, 7])
def test_processes_divide_the_runs(pools, num_runs):
    found = pools(4).results(particles_of, num_runs)
    assert found == found[:1] * 4
    assert len(found[0]["draws"]) == num_runs
    runs = {str(run) for run in found[0]["draws"]}
    assert len(runs) == num_runs


def sizes_of_chains(num_chains, chunk_size):
    sizes = []

    def noting_guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.8))
        sizes.append(len(z) if z.dim() > 1 else 1)

    options = {"num_chains": num_chains, "chunk_size": chunk_size, "num_temperatures": 2}
    annealed_importance_sampling(model, noting_guide, X, **options)
    return sizes


def test_each_process_has_its_share_of_the_chains(pools):
    found = pools(4).results(sizes_of_chains, 16, None)
    assert all(sizes[-1] == 4 and max(sizes) == 16 for sizes in found)
    found = pools(4).results(sizes_of_chains, 16, 2)
    assert all(sizes[-2:] == [2, 2] and max(sizes) == 2 for sizes in found)


def annealed():
    found = annealed_importance_sampling(
        model,
        None,
        X,
        num_chains=150,
        num_temperatures=15,
        num_leapfrog_steps=3,
        exact_sample={"z": dist.Normal(X / 2, math.sqrt(0.5)).sample()},
    )
    return found.log_evidence, found.std_error, found.upper, found.acceptance


def test_annealed_evidence_is_right(pools):
    log_evidence, std_error, upper, acceptance = pools(4).results(annealed)[0]
    assert ((log_evidence - EXACT) / std_error).abs().max() < 4.5
    assert ((upper - EXACT).abs() < 1).all()
    assert ((acceptance - 0.8).abs() < 0.15).all()


def calibration_of(options, scale=0.5**0.5):
    def fitted(model, data):
        def in_plate():
            if data["x"].dim() > 1:
                with pyro.plate("simulations", len(data["x"]), dim=-2):
                    one()
            else:
                one()

        def one():
            with pyro.plate("data", data["x"].shape[-1]):
                pyro.sample("z", dist.Normal(data["x"] / 2, scale))

        return lambda x: in_plate()

    found = simulation_based_calibration(model, fitted, X[:2], num_steps=0, **options)
    p_values = found.symmetry_p_values, found.uniformity_p_values
    return found.probabilities["z"].tolist(), [p["z"].tolist() for p in p_values]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_calibration_knows_right_guides_from_wrong_ones(pools, vectorize, size):
    options = {"num_simulations": 210, "num_samples": 50, "vectorize": vectorize}
    found = pools(size).results(calibration_of, options)
    assert found == found[:1] * size
    fractions, p_values = found[0]
    assert len(fractions) == 210
    assert len({tuple(row) for row in fractions}) == 210
    assert min(map(min, p_values)) > 1e-3
    _, (symmetry, uniformity) = pools(size).results(calibration_of, options, 0.3)[0]
    assert max(uniformity) < 1e-3
    assert min(symmetry) > 1e-4


def global_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def global_guide(x):
    n = len(x)
    pyro.sample("loc", dist.Normal(x.sum() / (n + 1), (n + 1) ** -0.5))


def local_model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 0.6))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def local_guide(x):
    n = len(x)
    loc = pyro.sample("loc", dist.Normal(x.sum() / (n + 1), (n + 1) ** -0.5))
    with pyro.plate("data", n):
        pyro.sample("z", dist.Normal(loc + 0.36 * (x - loc), 0.5))


def exact_elpd():
    """The sum of log p(x_n | the others), of which each is normal."""
    n = len(X)
    mean, variance = (X.sum() - X) / n, 1 + 1 / n
    return dist.Normal(mean, variance**0.5).log_prob(X).sum().item()


def loo_of(has_locals, num_samples):
    programs = (local_model, local_guide) if has_locals else (global_model, global_guide)
    with warnings.catch_warnings():
        if num_samples < 10:
            warnings.simplefilter("ignore")  # so few draws are not reliable
        found = loo(*programs, X, num_samples=num_samples, num_local_samples=50)
    return found["elpd_loo" if "elpd_loo" in found else "elpd"], found["n_samples"]


@pytest.mark.parametrize("has_locals", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_leave_one_out_is_right(pools, has_locals, size):
    found = pools(size).results(loo_of, has_locals, 1000)
    assert found == found[:1] * size
    # The standard deviation of 60 runs of one process is 0.057.
    assert found[0][0] == pytest.approx(exact_elpd(), abs=4.5 * 0.057)
    assert found[0][1] == 1000


def test_processes_without_draws_take_part(pools):
    found = pools(4).results(loo_of, False, 2)
    assert found == found[:1] * 4


def alone():
    diagnosis = diagnose(global_model, global_guide, X, num_samples=500)
    data = from_pyro_svi(global_model, global_guide, X, num_samples=200)
    loc = torch.as_tensor(data["posterior"]["loc"].values)
    return diagnosis.pareto_k, diagnosis.log_evidence, loc.shape, loc.mean().item()


def test_diagnoses_and_exports_are_made_by_each_process(pools):
    for pareto_k, log_evidence, shape, mean in pools(2).results(alone):
        assert pareto_k < 0.7
        assert log_evidence == pytest.approx(diagnose(global_model, global_guide, X).log_evidence)
        assert shape == (1, 200)
        assert abs(mean - X.sum().item() / 24) < 4.5 / math.sqrt(24 * 200)


def only_on_rank_1():
    return diagnose(global_model, global_guide, X).pareto_k if distributed.get_rank() else None


def test_a_single_process_can_diagnose(pools):
    assert pools(2).results(only_on_rank_1)[0] is None


def calibration_with_evidence():
    """A call inside of a divided call, with other numbers in each process."""
    found = []

    def make_guide(model_of_data, data):
        size = 10 + distributed.get_rank()
        found.append(estimate_evidence(model, guide, X, num_samples=size).num_samples)
        return guide

    options = {"num_simulations": 11, "num_samples": 5, "num_steps": 0, "vectorize": False}
    simulation_based_calibration(model, make_guide, X, **options)
    return found


def test_a_call_inside_of_a_divided_call_is_not_divided(pools):
    assert pools(2).results(calibration_with_evidence) == [[10] * 6, [11] * 5]
