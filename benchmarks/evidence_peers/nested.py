"""Nested sampling by dynesty (Speagle 2020)."""

import warnings

import dynesty
import numpy as np

from benchmarks.evidence_peers.densities import Densities
from benchmarks.evidence_run import Run
from tests.posteriors import Posterior

#: The largest number of coordinates. More of them take hours.
MAX_DIMS = 20


def run(posterior: Posterior, seed: int) -> Run:
    """Estimate the evidence with the default settings, but a weaker end: dlogz is 0.1."""
    density = Densities(np).of(posterior)
    sampler = dynesty.NestedSampler(
        density.log_ratio,
        density.from_uniform,
        density.num_dims,
        rstate=np.random.default_rng(seed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler.run_nested(dlogz=0.1, print_progress=False)
    found = sampler.results
    return Run(float(found.logz[-1]), int(found.ncall.sum()), float(found.logzerr[-1]))
