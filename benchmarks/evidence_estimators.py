"""Estimators of the evidence on the posteriors of ``tests/posteriors``, beside other libraries.

``benchmarks/evidence_peers`` says how to install these libraries. Those that are missing are left
out. The efficiency is the root mean square error times the root of the number of evaluations.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
from torch import Tensor

from benchmarks.evidence_peers.densities import Densities
from benchmarks.evidence_run import Run
from benchmarks.harness import Options, Table
from pyro_ext.infer import (
    Evidence,
    annealed_importance_sampling,
    estimate_evidence,
    sequential_monte_carlo,
)
from pyro_ext.infer.annealing.flat_target import FlatTarget
from tests.posteriors import POSTERIORS, Posterior

#: estimator -> (library, module of benchmarks.evidence_peers)
PEERS = {
    "PyMC sample_smc": ("pymc", "pymc_smc"),
    "BlackJAX tempered SMC": ("blackjax", "tempered"),
    "dynesty": ("dynesty", "nested"),
}
NUM_SEEDS = 50
#: The number of draws of importance sampling.
NUM_DRAWS = 10_000
NUM_QUICK_SEEDS = 5
#: The time for one row, in seconds, after which no other seed begins.
MAX_SECONDS = 900
MAX_PEER_SECONDS = 300
COLUMNS = [
    "estimator",
    "log evidence",
    "mean estimate",
    "root mean square error",
    "reported error",
    "mean square of error / reported error, without flag",
    "runs with a flag",
    "evaluations",
    "seconds",
    "error x sqrt(evaluations)",
]


@contextmanager
def counted_evaluations() -> Iterator[list[int]]:
    """Count the evaluations of the model's density in annealing and sequential Monte Carlo.

    Each call adds its number of particles to the list. A draw is evaluated once.
    """
    found: list[int] = []
    slopes, draw = FlatTarget.slopes, FlatTarget.draw

    def count_slopes(self: FlatTarget, positions: Tensor, beta: Any) -> Any:
        found.append(len(positions))
        return slopes(self, positions, beta)

    def count_draws(self: FlatTarget, num_particles: int, sample: Any = None) -> Any:
        found.append(num_particles)
        return draw(self, num_particles, sample)

    with (
        patch.object(FlatTarget, "slopes", count_slopes),
        patch.object(FlatTarget, "draw", count_draws),
    ):
        yield found


def annealed(posterior: Posterior, guide: Any) -> Evidence:
    """Anneal 64 chains."""
    return annealed_importance_sampling(
        posterior.model,
        guide,
        *posterior.args,
        num_chains=64,
        num_temperatures=100,
        num_leapfrog_steps=5,
        compile="eager",
    )


def sequential(posterior: Posterior, guide: Any) -> Evidence:
    """Run sequential Monte Carlo with default settings."""
    return sequential_monte_carlo(posterior.model, guide, *posterior.args, compile="eager").evidence


def importance(posterior: Posterior, guide: Any) -> Evidence:
    """Draw from a guide. Its training does not count."""
    return estimate_evidence(
        posterior.model,
        guide,
        *posterior.args,
        num_samples=NUM_DRAWS,
        chunk_size=1000,
        jackknife_orders=(),
    )


Estimator = Callable[[Posterior, Any], Evidence]


def estimators(posterior: Posterior) -> Iterator[tuple[str, Estimator, str | None]]:
    """Yield the name of each estimator, the estimator, and the name of its guide."""
    for name in dict.fromkeys([posterior.start, *posterior.guides]):
        source = "prior" if name is None else f"{name} guide"
        if name == posterior.start:
            yield f"annealing, {source}", annealed, name
        yield f"sequential_monte_carlo, {source}", sequential, name
        if name is not None:
            yield f"importance sampling, {source}", importance, name


def own_run(estimator: Estimator, guide: Any, posterior: Posterior, seed: int) -> Run:
    """Run an estimator of this package."""
    pyro.set_rng_seed(seed)
    with warnings.catch_warnings(), counted_evaluations() as counted:
        warnings.simplefilter("ignore", UserWarning)  # the flags say the same
        found = estimator(posterior, guide)
    evaluations = sum(counted) or NUM_DRAWS
    error = found.std_error.item()
    return Run(found.log_evidence.item(), evaluations, error, tuple(found.flags))


def row(
    name: str,
    run: Callable[[Posterior, int], Run],
    posterior: Posterior,
    num_seeds: int,
    max_seconds: float = MAX_SECONDS,
) -> list[Any]:
    """Run an estimator with several seeds, unless it takes too long, and return its columns."""
    runs: list[Run] = []
    seconds: list[float] = []
    while len(runs) < num_seeds and sum(seconds) < max_seconds:
        start = time.perf_counter()
        runs.append(run(posterior, len(runs)))
        seconds.append(time.perf_counter() - start)
    errors = np.array([run.log_evidence - posterior.log_evidence for run in runs])
    reported = np.array([run.std_error for run in runs])
    flagged = np.array([bool(run.flags) for run in runs])
    rmse = float(np.sqrt((errors**2).mean()))
    evaluations = float(np.mean([run.evaluations for run in runs]))
    known = np.hypot(reported, posterior.log_evidence_error)
    judged = ~flagged & (known != 0)  # an error of zero is exact
    names = ", ".join(sorted({flag for run in runs for flag in run.flags}))
    return [
        name,
        f"{posterior.log_evidence:.4f}",
        f"{posterior.log_evidence + errors.mean():.4f}",
        rmse,
        float(reported.mean()),
        float(((errors[judged] / known[judged]) ** 2).mean()) if judged.any() else math.nan,
        f"{flagged.sum()} of {len(runs)}" + (f" ({names})" if names else ""),
        round(evaluations),
        float(np.median(seconds)),
        rmse * math.sqrt(evaluations),
    ]


def tables(options: Options) -> Iterator[Table]:
    """A table for each posterior, with a row for each estimator."""
    num_seeds = NUM_QUICK_SEEDS if options.quick else NUM_SEEDS
    installed = {name: module for name, (lib, module) in PEERS.items() if find_spec(lib)}
    missing = [name for name in PEERS if name not in installed]
    for name, build in POSTERIORS.items():
        table = Table(f"Evidence of {name}", COLUMNS, chart=(COLUMNS[:1], COLUMNS[-1]))
        posterior = build()
        moved = replace(posterior, args=tuple(x.to(options.device) for x in posterior.args))
        for label, estimator, guide_name in estimators(moved):
            pyro.set_rng_seed(0)
            run = partial(own_run, estimator, moved.guide(guide_name))
            table.rows.append(row(label, run, moved, num_seeds))
        for label, module in installed.items():
            peer = import_module(f"benchmarks.evidence_peers.{module}")
            if Densities(np).of(posterior).num_dims <= getattr(peer, "MAX_DIMS", math.inf):
                found = row(label, peer.run, posterior, num_seeds, MAX_PEER_SECONDS)
                table.rows.append(found)
        if missing:
            table.note = f"Left out, not installed: {', '.join(missing)}."
        yield table
