"""``sample_smc`` of PyMC (Abril-Pla et al. 2023), with independent Metropolis-Hastings moves."""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pymc as pm
from scipy.special import logsumexp

from benchmarks.evidence_run import Run
from tests.posteriors import Posterior, eight_schools, funnel, regression, two_modes
from tests.posteriors import logistic_regression as logistic

NUM_DRAWS = 1000
NUM_CHAINS = 4


def _regression(design: Any, y: Any) -> None:
    w = pm.Normal("w", 0.0, 1.0, shape=design.shape[1])
    pm.Normal("y", design @ w, regression.NOISE, observed=y)


def _logistic(design: Any, y: Any) -> None:
    w = pm.Normal("w", 0.0, logistic.PRIOR_SCALE, shape=design.shape[1])
    pm.Bernoulli("y", logit_p=design @ w, observed=y)


def _two_modes(x: Any) -> None:
    z = pm.Normal("z", 0.0, two_modes.PRIOR_SCALE, shape=len(x))
    terms = [
        math.log(prob) + pm.logp(pm.Normal.dist(z - loc, two_modes.NOISE), x).sum()
        for loc, prob in two_modes.MODES
    ]
    pm.Potential("x", pm.math.logaddexp(*terms))


def _funnel(loc: Any) -> None:
    v = pm.Normal("v", 0.0, 3.0)
    x = pm.Normal("x", 0.0, 3.0, shape=len(loc))
    scaled, wide = pm.Normal.dist(0.0, pm.math.exp(v / 2)), pm.Normal.dist(0.0, 3.0)
    pm.Potential("ratio", (pm.logp(scaled, x) - pm.logp(wide, x)).sum())


def _funnel_observed(y: Any) -> None:
    v = pm.Normal("v", 0.0, 3.0)
    x = pm.Normal("x", 0.0, pm.math.exp(v / 2), shape=len(y))
    pm.Normal("y", x, funnel.NOISE, observed=y)


def _schools(centered: bool) -> Callable[[Any, Any], None]:
    def build(sigma: Any, y: Any) -> None:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        if centered:
            theta = pm.Normal("theta", mu, tau, shape=len(y))
        else:
            theta = mu + tau * pm.Normal("eta", 0.0, 1.0, shape=len(y))
        pm.Normal("y", theta, sigma, observed=y)

    return build


_MODELS: dict[Any, Callable[..., None]] = {
    regression.model: _regression,
    logistic.model: _logistic,
    two_modes.model: _two_modes,
    funnel.model: _funnel,
    funnel.observed_model: _funnel_observed,
    eight_schools.centered: _schools(centered=True),
    eight_schools.non_centered: _schools(centered=False),
}


class CountingIMH(pm.smc.IMH):
    """PyMC's moves, with a count of the evaluations of all chains."""

    evaluations = 0

    def setup_kernel(self) -> None:
        """Count the first particles."""
        super().setup_kernel()
        CountingIMH.evaluations += self.draws

    def mutate(self) -> None:
        """Count the proposals. PyMC's own count of steps starts at 1."""
        super().mutate()
        CountingIMH.evaluations += self.draws * (self.n_steps - 1)


def model_of(posterior: Posterior) -> pm.Model:
    """Return the model of a posterior, with PyMC's order of the coordinates."""
    with pm.Model() as model:
        _MODELS[posterior.model](*(x.numpy() for x in posterior.args))
    return model


def run(posterior: Posterior, seed: int) -> Run:
    """Estimate the evidence with default settings, but for the number of draws."""
    logging.getLogger("pymc").setLevel(logging.ERROR)
    CountingIMH.evaluations = 0
    with model_of(posterior), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pm.sample_smc(
            NUM_DRAWS,
            kernel=CountingIMH,
            chains=NUM_CHAINS,
            cores=1,
            random_seed=seed,
            progressbar=False,
            compute_convergence_checks=False,
        )
    stages = found.sample_stats["log_marginal_likelihood"].values
    # Chains with different numbers of stages come as one row of lists.
    rows = stages[0] if isinstance(stages.flat[0], list) else stages
    logs = np.array([row[-1] for row in rows], dtype=float)
    relative = np.exp(logs - logs.max())
    error = relative.std(ddof=1) / relative.mean() / math.sqrt(NUM_CHAINS)
    log_evidence = float(logsumexp(logs) - math.log(NUM_CHAINS))
    return Run(log_evidence, CountingIMH.evaluations, float(error))
