import pyro
import pytest
import torch

from pyro_ext.infer import annealed_importance_sampling, sequential_monte_carlo
from pyro_ext.infer.annealing.flags import is_beyond_noise
from tests.posteriors import POSTERIORS

NUM_SEEDS = 20
ESTIMATORS = {
    "sequential": lambda *programs: sequential_monte_carlo(*programs, compile="eager").evidence,
    "annealed": lambda *programs: annealed_importance_sampling(
        *programs, num_chains=32, check_prior=True, compile="eager"
    ),
}


@pytest.mark.parametrize(
    ("num_errors", "num_points", "num_samples", "expected"),
    [(4.1, 1, 10**6, True), (3.9, 1, 10**6, False), (4.1, 100, 10**6, False), (6.0, 1, 4, False)],
)
def test_few_draws_and_many_data_points_have_larger_noise(
    num_errors, num_points, num_samples, expected
):
    error = torch.full((num_points,), 0.1)
    assert is_beyond_noise(num_errors * error, error, num_samples).all() == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("start", ["prior", "guide"])
@pytest.mark.parametrize("name", ["eight_schools_centered", "funnel", "two_modes_2"])
def test_an_estimate_is_right_or_has_a_flag(name, start, estimator):
    posterior = POSTERIORS[name]()
    guide = posterior.start or next(iter(posterior.guides), None) if start == "guide" else None
    programs = posterior.model, posterior.guide(guide), *posterior.args
    for seed in range(NUM_SEEDS):
        pyro.set_rng_seed(seed)
        found = estimator(*programs)
        error = (found.log_evidence - posterior.log_evidence).abs()
        rounding = 1e-9  # all that there is where the start is the posterior
        assert error < 4.5 * found.std_error + rounding or found.flags
