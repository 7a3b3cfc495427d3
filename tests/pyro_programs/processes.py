"""Gaussian processes of ``pyro.contrib.gp``, with parameters or with priors."""

from typing import Any

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from tests.pyro_programs.program import Pair, program

X = torch.linspace(0.0, 3.0, 6)
Y = X.sin() + torch.tensor([0.1, -0.1, 0.0, 0.1, 0.0, -0.1])


def pair(module: Any) -> Pair:
    return module.model, module.guide, (), {}


@program()
def gp_regression() -> Pair:
    """Parameters alone: there is no latent site."""
    return pair(gp.models.GPRegression(X, Y, gp.kernels.RBF(1), noise=torch.tensor(0.1)))


@program(one_at_a_time=True)
def gp_with_priors() -> Pair:
    kernel = gp.kernels.RBF(1)
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.variance = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.autoguide("lengthscale", dist.Normal)
    kernel.autoguide("variance", dist.Normal)
    return pair(gp.models.GPRegression(X, Y, kernel, noise=torch.tensor(0.1)))


@program()
def sparse_gp() -> Pair:
    model = gp.models.SparseGPRegression(X, Y, gp.kernels.Matern32(1), Xu=X[::2].clone())
    return pair(model)


@program()
def variational_gp() -> Pair:
    """A classification: the function values are latent."""
    likelihood = gp.likelihoods.Binary()
    return pair(gp.models.VariationalGP(X, (Y > 0).float(), gp.kernels.RBF(1), likelihood))


@program()
def variational_sparse_gp() -> Pair:
    """Three classes, and a minibatch of a larger data set."""
    return pair(
        gp.models.VariationalSparseGP(
            X,
            torch.arange(6) % 3,
            gp.kernels.RBF(1),
            X[::2].clone(),
            gp.likelihoods.MultiClass(num_classes=3),
            latent_shape=torch.Size([3]),
            num_data=60,
            whiten=True,
        )
    )


@program(one_at_a_time=True)
def gp_latent_variables() -> Pair:
    y = torch.randn(3, 5)  # outputs, data points
    base = gp.models.SparseGPRegression(
        torch.randn(5, 2), y, gp.kernels.RBF(2), torch.randn(3, 2), jitter=1e-3
    )
    return pair(gp.models.GPLVM(base))


class DeepGP(PyroModule):
    """Two layers. The first layer's output is drawn, and is the input of the second."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        inner = x.repeat(2, 1)
        self.first = gp.models.VariationalSparseGP(
            x, None, gp.kernels.RBF(1), x[::2].clone(), None, latent_shape=torch.Size([2])
        )
        likelihood = gp.likelihoods.Gaussian()
        self.last = gp.models.VariationalSparseGP(
            inner.t(), y, gp.kernels.RBF(2), torch.randn(3, 2), likelihood
        )

    def model(self) -> None:
        loc, variance = self.first.model()
        h = dist.Normal(loc, variance.sqrt())().t()
        self.last.set_data(h, self.last.y)
        self.last.model()

    def guide(self) -> None:
        self.first.guide()
        self.last.guide()


@program()
def deep_gp() -> Pair:
    return pair(DeepGP(X, Y))


@program()
def deep_kernel() -> Pair:
    """A network warps the inputs of the kernel."""
    network = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2))
    kernel = gp.kernels.Warping(gp.kernels.RBF(2), iwarping_fn=network)
    x = X.unsqueeze(-1)
    likelihood = gp.likelihoods.Binary()
    model = gp.models.VariationalSparseGP(x, (Y > 0).float(), kernel, x[::2].clone(), likelihood)
    return pair(model)


@program(one_at_a_time=True)
def kernel_by_hand() -> Pair:
    """A covariance of latent scales, made with ``outer`` and indices from the left."""

    def model(x: Tensor, y: Tensor) -> None:
        scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
        distance = (x.unsqueeze(0) - x.unsqueeze(1)).square()
        k = scales[0] * (-distance / scales[1]).exp() + 0.1 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), k), obs=y)

    return model, pyro.infer.autoguide.AutoMultivariateNormal(model), (X, Y), {}
