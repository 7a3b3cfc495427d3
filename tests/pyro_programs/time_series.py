"""Forecasts, Markov processes and epidemics of ``pyro.contrib``."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.epidemiology.models import SimpleSIRModel
from pyro.contrib.forecast import ForecastingModel
from pyro.contrib.forecast.util import time_reparam_dct
from pyro.contrib.timeseries import GenericLGSSM, IndependentMaternGP
from pyro.contrib.tracking.distributions import EKFDistribution
from pyro.contrib.tracking.dynamic_models import NcvContinuous
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import LinearHMMReparam, StudentTReparam
from torch import Tensor

from tests.pyro_programs.program import Pair, program


class Trend(ForecastingModel):
    """A random walk with a regression on covariates."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, scale))
        level = drift.cumsum(-1).unsqueeze(-1)
        prediction = level + weight.unsqueeze(-1) * covariates
        self.predict(dist.StudentT(4.0, 0.0, 0.3), prediction)


@program()
def forecast_univariate() -> Pair:
    model = poutine.reparam(Trend(), time_reparam_dct)
    return model, AutoNormal(model), (torch.randn(5, 1), torch.ones(5, 1)), {}


class Seasons(ForecastingModel):
    """Two correlated series in each of three regions, with a linear HMM as the noise."""

    def model(self, zero_data: Tensor, covariates: Tensor) -> None:
        dim = zero_data.size(-1)
        tril = pyro.sample("tril", dist.LKJCholesky(dim, torch.ones(())))
        with pyro.plate("regions", zero_data.size(-3), dim=-2), self.time_plate:
            season = pyro.sample("season", dist.Normal(torch.zeros(dim), 0.3).to_event(1))
        eye = torch.eye(dim)
        start = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
        noise = dist.MultivariateNormal(torch.zeros(dim), scale_tril=tril)
        seen = dist.StudentT(5.0, torch.zeros(dim), 0.5).to_event(1)
        hmm = dist.LinearHMM(start, eye, noise, eye, seen, duration=zero_data.size(-2))
        with pyro.plate("predicted", zero_data.size(-3), dim=-2):
            rule = LinearHMMReparam(obs=StudentTReparam())
            with poutine.reparam(config={"residual": rule}):
                self.predict(hmm, season)


@program()
def forecast_multivariate() -> Pair:
    model = Seasons()
    return model, AutoNormal(model), (torch.randn(3, 4, 2), torch.zeros(4, 0)), {}


@program()
def matern_process() -> Pair:
    """The log-probability of a whole process is a factor. There is no latent site."""
    process = IndependentMaternGP(nu=1.5, obs_dim=2, length_scale_init=torch.ones(2))

    def model(y: Tensor) -> None:
        pyro.module("process", process)
        with pyro.plate("outputs", 2):
            pyro.factor("y", process.log_prob(y))

    return model, lambda y: None, (torch.randn(5, 2),), {}


@program(one_at_a_time=True)
def linear_state_space() -> Pair:
    """A process shifted by a latent number. Its log-probability has no dims for particles."""
    process = GenericLGSSM(obs_dim=1, state_dim=2)

    def model(y: Tensor) -> None:
        pyro.module("process", process)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.factor("y", process.log_prob(y - shift).sum())

    return model, AutoNormal(model), (torch.randn(5, 1),), {}


@program(one_at_a_time=True)
def tracking() -> Pair:
    """An extended Kalman filter, with latent scales of both noises."""

    def model(positions: Tensor) -> None:
        process = pyro.sample("process", dist.LogNormal(0.0, 0.5))
        measured = pyro.sample("measured", dist.LogNormal(-1.0, 0.5))
        dynamics = NcvContinuous(4, process)
        covariance = measured * torch.eye(2)
        start = torch.zeros(4), torch.eye(4)
        track = EKFDistribution(*start, dynamics, covariance, len(positions))
        pyro.sample("track", track, obs=positions)

    return model, AutoNormal(model), (torch.randn(3, 2).cumsum(0),), {}


@program()
def epidemic_relaxed() -> Pair:
    epidemic = SimpleSIRModel(20, 2.0, torch.tensor([1.0, 2.0, 1.0]))
    epidemic.relaxed, epidemic.num_quant_bins = True, 1
    init = epidemic._heuristic(None, num_particles=64)
    model = epidemic._relaxed_model
    return model, AutoNormal(model, init_loc_fn=init, init_scale=0.01), (), {}
