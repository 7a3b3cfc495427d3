import pyro
import pytest

from pyro_ext.infer import annealed_importance_sampling, sequential_monte_carlo
from tests.posteriors import POSTERIORS

NUM_SEEDS = 20
ESTIMATORS = {
    "sequential": lambda *programs: sequential_monte_carlo(*programs, compile="eager").evidence,
    "annealed": lambda *programs: annealed_importance_sampling(
        *programs, num_chains=32, check_prior=True, compile="eager"
    ),
}


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
        assert error < 4.5 * found.std_error or found.flags
