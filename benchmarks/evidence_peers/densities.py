"""The posteriors in NumPy or JAX, over one vector of unconstrained coordinates.

The coordinates are those of the latent sites in the order of the model. A positive site has its
logarithm as coordinate.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import ndtri

from tests.posteriors import Posterior, eight_schools, funnel, regression, two_modes
from tests.posteriors import logistic_regression as logistic

Function = Callable[[Any], Any]


@dataclass(frozen=True)
class Density:
    """A posterior as a ratio to the distribution from which samplers start.

    :ivar num_dims: the number of coordinates.
    :ivar from_uniform: a map from uniform coordinates to a draw of the start, in NumPy.
    :ivar log_start: the log density of the start.
    :ivar log_ratio: the log of the joint density over that of the start.
    """

    num_dims: int
    from_uniform: Function
    log_start: Function
    log_ratio: Function


class Densities:
    """The densities in the functions of a library.

    :param xp: NumPy or jax.numpy.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self._builders: dict[Any, Callable[..., Density]] = {
            regression.model: self._regression,
            logistic.model: self._logistic,
            two_modes.model: self._two_modes,
            funnel.model: self._funnel,
            funnel.observed_model: self._funnel_observed,
            eight_schools.centered: partial(self._schools, True),
            eight_schools.non_centered: partial(self._schools, False),
        }

    def of(self, posterior: Posterior) -> Density:
        """Return the density of a posterior."""
        data = (self.xp.asarray(x.numpy()) for x in posterior.args)
        return self._builders[posterior.model](*data)

    def _log_normal(self, x: Any, loc: Any, scale: Any) -> Any:
        """Return the sum of normal log densities."""
        log_p = -0.5 * ((x - loc) / scale) ** 2 - self.xp.log(scale) - 0.5 * math.log(2 * math.pi)
        return log_p.sum()

    def _normal_start(self, scale: float, num_dims: int, log_ratio: Function) -> Density:
        return Density(
            num_dims,
            lambda u: scale * ndtri(u),
            lambda z: self._log_normal(z, 0.0, scale),
            log_ratio,
        )

    def _regression(self, design: Any, y: Any) -> Density:
        def log_ratio(w: Any) -> Any:
            return self._log_normal(y, design @ w, regression.NOISE)

        return self._normal_start(1.0, design.shape[1], log_ratio)

    def _logistic(self, design: Any, y: Any) -> Density:
        def log_ratio(w: Any) -> Any:
            logits = design @ w
            return (y * logits - self.xp.logaddexp(0.0, logits)).sum()

        return self._normal_start(logistic.PRIOR_SCALE, design.shape[1], log_ratio)

    def _two_modes(self, x: Any) -> Density:
        def log_ratio(z: Any) -> Any:
            terms = [
                math.log(prob) + self._log_normal(x, z - loc, two_modes.NOISE)
                for loc, prob in two_modes.MODES
            ]
            return self.xp.logaddexp(*terms)

        return self._normal_start(two_modes.PRIOR_SCALE, len(x), log_ratio)

    def _log_funnel(self, z: Any) -> Any:
        scaled = self._log_normal(z[1:], 0.0, self.xp.exp(z[0] / 2))
        return self._log_normal(z[0], 0.0, 3.0) + scaled

    def _funnel(self, loc: Any) -> Density:
        def log_ratio(z: Any) -> Any:
            return self._log_funnel(z) - self._log_normal(z, 0.0, 3.0)

        return self._normal_start(3.0, 1 + len(loc), log_ratio)

    def _funnel_observed(self, y: Any) -> Density:
        def from_uniform(u: Any) -> Any:
            v, *e = ndtri(u)
            return np.array([3 * v, *(math.exp(1.5 * v) * np.array(e))])

        def log_ratio(z: Any) -> Any:
            return self._log_normal(y, z[1:], funnel.NOISE)

        return Density(1 + len(y), from_uniform, self._log_funnel, log_ratio)

    def _schools(self, centered: bool, sigma: Any, y: Any) -> Density:
        def from_uniform(u: Any) -> Any:
            mu, tau, e = 5 * ndtri(u[0]), 5 * math.tan(math.pi / 2 * u[1]), ndtri(u[2:])
            return np.array([mu, math.log(tau), *(mu + tau * e if centered else e)])

        def log_start(z: Any) -> Any:
            mu, tau = z[0], self.xp.exp(z[1])
            log_tau = math.log(2 / (5 * math.pi)) - self.xp.log1p((tau / 5) ** 2) + z[1]
            local = (mu, tau) if centered else (0.0, 1.0)
            return self._log_normal(mu, 0.0, 5.0) + log_tau + self._log_normal(z[2:], *local)

        def log_ratio(z: Any) -> Any:
            theta = z[2:] if centered else z[0] + self.xp.exp(z[1]) * z[2:]
            return self._log_normal(y, theta, sigma)

        return Density(2 + len(y), from_uniform, log_start, log_ratio)
