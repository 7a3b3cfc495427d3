"""Adaptive tempered SMC by BlackJAX (Cabezas et al. 2024), with Hamiltonian moves.

The covariance of the particles is the inverse mass. The step size follows the acceptance, up to a
quarter of a period of a normal density.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.smc import extend_params
from blackjax.smc.resampling import systematic
from blackjax.smc.tuning.from_particles import particles_covariance_matrix

from benchmarks.evidence_peers.densities import Densities
from benchmarks.evidence_run import Run
from tests.posteriors import Posterior

jax.config.update("jax_enable_x64", True)

NUM_PARTICLES = 1000
NUM_MOVES = 1
NUM_LEAPFROG_STEPS = 4
TARGET_ESS = 0.7
TARGET_ACCEPTANCE = 0.8


@cache
def _compiled(posterior: Posterior) -> Callable[..., Any]:
    """Return a compiled step to the next temperature."""
    density = Densities(jnp).of(posterior)

    @jax.jit
    def step(key: Any, state: Any, step_size: Any) -> Any:
        covariance = particles_covariance_matrix(state.particles)
        parameters = {
            "step_size": step_size,
            "inverse_mass_matrix": covariance.reshape(density.num_dims, density.num_dims),
        }
        smc = blackjax.adaptive_tempered_smc(
            density.log_start,
            density.log_ratio,
            partial(blackjax.hmc.build_kernel(), num_integration_steps=NUM_LEAPFROG_STEPS),
            blackjax.hmc.init,
            extend_params(parameters),
            systematic,
            TARGET_ESS,
            num_mcmc_steps=NUM_MOVES,
        )
        state, info = smc.step(key, state)
        acceptance = info.update_info.acceptance_rate.mean()
        step_size = step_size * jnp.exp(acceptance - TARGET_ACCEPTANCE)
        step_size = jnp.minimum(step_size, 0.5 * math.pi / NUM_LEAPFROG_STEPS)
        return state, step_size, info.log_likelihood_increment

    return step


def run(posterior: Posterior, seed: int) -> Run:
    """Estimate the evidence. BlackJAX reports no error."""
    density, step = Densities(np).of(posterior), _compiled(posterior)
    key = jax.random.key(seed)
    uniform = np.random.default_rng(seed).random((NUM_PARTICLES, density.num_dims))
    state = blackjax.smc.tempered.init(jnp.array([density.from_uniform(u) for u in uniform]))
    state = state._replace(tempering_param=jnp.zeros(()))
    step_size, log_evidence, num_steps = jnp.array(0.3), 0.0, 0
    while state.tempering_param < 1:
        key, own = jax.random.split(key)
        state, step_size, increment = step(own, state, step_size)
        log_evidence, num_steps = log_evidence + float(increment), num_steps + 1
    # A step evaluates each particle for its temperature, to start the moves, and for its weight.
    evaluations = num_steps * NUM_PARTICLES * (NUM_MOVES * NUM_LEAPFROG_STEPS + 3)
    return Run(log_evidence, evaluations)
