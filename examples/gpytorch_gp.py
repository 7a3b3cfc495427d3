"""Fit a sparse Gaussian process of gpytorch with Pyro's inference.

::

    python examples/gpytorch_gp.py [--steps 500]
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_ext.infer import CompiledSVI


class SparseGP(gpytorch.models.PyroGP):
    def __init__(self, num_data: int, num_inducing: int = 16) -> None:
        points = torch.linspace(0, 1, num_inducing)
        distribution = gpytorch.variational.CholeskyVariationalDistribution(num_inducing)
        strategy = gpytorch.variational.VariationalStrategy(self, points, distribution)
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        super().__init__(strategy, likelihood, num_data=num_data, name_prefix="gp")
        self.mean = gpytorch.means.ConstantMean()
        self.covariance = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.covariance(x))


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x = torch.linspace(0, 1, 100, dtype=torch.float64)
    y = torch.sin(2 * math.pi * x) + 0.1 * torch.randn(100)
    gp = SparseGP(len(x)).double()  # kernel matrices are nearly singular in float32
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, retain_graph=True)
    svi = make_svi(gp.model, gp.guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    return [svi.step(x, y) for _ in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
