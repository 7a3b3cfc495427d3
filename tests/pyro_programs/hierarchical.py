"""Generalised linear and hierarchical models."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor
from torch.nn.functional import softplus

from tests.pyro_programs.program import Pair, masked, program

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> None:
    eta = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(eta, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


@program()
def eight_schools_centered() -> Pair:
    def guide(sigma: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 3.0))
        pyro.sample("tau", dist.LogNormal(pyro.param("t", torch.tensor(1.0)), 0.5))
        locs = pyro.param("locs", torch.zeros(8))
        with pyro.plate("schools", 8):
            pyro.sample("theta", dist.Normal(locs, 5.0))

    return eight_schools, guide, (ERRORS,), {"y": EFFECTS}


@program()
def eight_schools_noncentered() -> Pair:
    model = poutine.reparam(eight_schools, {"theta": LocScaleReparam(0.0)})
    return model, AutoDiagonalNormal(model), (ERRORS, EFFECTS), {}


@program()
def eight_schools_learned_centering() -> Pair:
    model = poutine.reparam(eight_schools, {"theta": LocScaleReparam()})
    return model, AutoNormal(model), (ERRORS, EFFECTS), {}


@program()
def baseball() -> Pair:
    """Hits of players, with a hierarchical prior of the log odds."""
    at_bats = torch.full((6,), 45.0)

    def model(at_bats: Tensor, hits: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        with pyro.plate("players", len(at_bats)):
            alpha = pyro.sample("alpha", dist.Normal(loc, scale))
            pyro.sample("obs", dist.Binomial(at_bats, logits=alpha), obs=hits)

    hits = torch.tensor([18.0, 17.0, 14.0, 12.0, 10.0, 7.0])
    return model, AutoMultivariateNormal(model), (at_bats, hits), {}


@program()
def lkj_covariance() -> Pair:
    def model(y: Tensor) -> None:
        d = y.shape[1]
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d)).to_event(1))
        tril = pyro.sample("L_omega", dist.LKJCholesky(d, torch.ones(())))
        scale_tril = theta.sqrt().unsqueeze(-1) * tril
        with pyro.plate("observations", len(y)):
            mean = torch.zeros(d)
            fn = dist.MultivariateNormal(mean, scale_tril=scale_tril)
            pyro.sample("obs", fn, obs=y)

    return model, AutoNormal(model), (torch.randn(6, 3),), {}


@program(one_at_a_time=True)
def lkj_from_example() -> Pair:
    """As above, but the scale is a product of two matrices, ``mm`` and ``diag``."""

    def model(y: Tensor) -> None:
        d = y.shape[1]
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(d)).to_event(1))
        tril = pyro.sample("L_omega", dist.LKJCholesky(d, torch.ones(())))
        scale_tril = torch.mm(torch.diag(theta.sqrt()), tril)
        with pyro.plate("observations", len(y)):
            fn = dist.MultivariateNormal(torch.zeros(d), scale_tril=scale_tril)
            pyro.sample("obs", fn, obs=y)

    return model, AutoNormal(model), (torch.randn(6, 3),), {}


@program(one_at_a_time=True)
def sparse_regression() -> Pair:
    """A quadratic regression in kernel form: the kernel calls ``mm`` and ``t``."""

    def kernel(x: Tensor, eta1: Tensor, eta2: Tensor) -> Tensor:
        dot = torch.mm(x, x.t())
        return 0.5 * eta2**2 * (1 + dot) ** 2 + (eta1**2 - eta2**2) * dot + 1.0

    def model(x: Tensor, y: Tensor) -> None:
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        eta1 = pyro.sample("eta1", dist.HalfCauchy(0.3 * sigma))
        msq = pyro.sample("msq", dist.InverseGamma(2.0, 2.0))
        lam = pyro.sample("lambda", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        kappa = msq.sqrt() * lam / (msq + (eta1 * lam) ** 2).sqrt()
        k = kernel(kappa * x, eta1, eta1**2 / msq) + (sigma**2 + 1e-3) * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), k), obs=y)

    return model, AutoDelta(model), (torch.randn(5, 3), torch.randn(5)), {}


@program()
def sparse_gamma_def() -> Pair:
    """Layers of Gamma draws, whose weights are reshaped as the example does."""
    sizes = {"top": (2, 3), "bottom": (3, 4)}

    def model(x: Tensor) -> None:
        weights = {}
        for name, (above, below) in sizes.items():
            with pyro.plate(f"w_{name}_plate", above * below):
                w = pyro.sample(f"w_{name}", dist.Gamma(0.3, 0.3))
            shape = (above, below) if w.dim() == 1 else (-1, above, below)
            weights[name] = w.reshape(shape)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z_top", dist.Gamma(0.5, 0.5).expand([2]).to_event(1))
            mean = torch.matmul(z, weights["top"]) + 1e-3
            z = pyro.sample("z_bottom", dist.Gamma(0.5, 0.5 / mean).to_event(1))
            rate = torch.matmul(z, weights["bottom"]) + 1e-3
            pyro.sample("obs", dist.Poisson(rate).to_event(1), obs=x)

    def gamma(name: str, *shape: int) -> Any:
        alpha = softplus(pyro.param(f"alpha_{name}", 0.5 + 0.1 * torch.randn(shape)))
        mean = softplus(pyro.param(f"mean_{name}", 0.1 * torch.randn(shape)))
        return dist.Gamma(alpha, alpha / mean)

    def guide(x: Tensor) -> None:
        for name, (above, below) in sizes.items():
            with pyro.plate(f"w_{name}_plate", above * below):
                pyro.sample(f"w_{name}", gamma(f"w_{name}", above * below))
        with pyro.plate("data", len(x)):
            for name, width in (("top", 2), ("bottom", 3)):
                pyro.sample(f"z_{name}", gamma(f"z_{name}", len(x), width).to_event(1))

    return model, guide, (torch.randint(0, 5, (4, 4)).float(),), {}


@program()
def zero_inflated_poisson() -> Pair:
    def model(x: Tensor, y: Tensor) -> None:
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        gate = pyro.sample("gate", dist.Beta(1.0, 3.0))
        with pyro.plate("data", len(x)):
            rate = (x * coefficients).sum(-1).exp()
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)

    y = torch.tensor([0.0, 2.0, 0.0, 1.0, 3.0])
    return model, AutoDiagonalNormal(model), (0.5 * torch.randn(5, 2), y), {}


@program(one_at_a_time=True)
def poisson_regression() -> Pair:
    """Coefficients that a matrix product applies, as in a formula on paper."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Poisson((x @ w).exp()), obs=y)

    y = torch.tensor([0.0, 2.0, 0.0, 1.0])
    return model, AutoNormal(model), (0.5 * torch.randn(4, 2), y), {}


@program()
def censored_survival() -> Pair:
    """Observed times have a density, censored ones a factor with their survival function."""

    def model(time: Tensor, is_censored: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("patients", len(time)):
            with masked(~is_censored):
                pyro.sample("time", dist.Exponential(rate), obs=time)
            with masked(is_censored):
                pyro.factor("survival", -rate * time)

    time = torch.tensor([0.3, 1.2, 0.8, 2.0])
    return model, AutoNormal(model), (time, time > 1.0), {}


@program(enumerated=True, elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1))
def capture_recapture() -> Pair:
    """Marked animals, seen or not at each time after the first capture."""

    def model(history: Tensor) -> None:
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        rho = pyro.sample("rho", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(history), dim=-1):
            z, was_seen = torch.ones(len(history)), torch.zeros(len(history)).bool()
            for t in pyro.markov(range(history.shape[1])):
                with masked(was_seen):
                    alive = was_seen.float() * phi * z + (1 - was_seen.float())
                    infer: Any = {"enumerate": "parallel"}
                    z = pyro.sample(f"z_{t}", dist.Bernoulli(alive), infer=infer)
                    pyro.sample(f"y_{t}", dist.Bernoulli(rho * z), obs=history[:, t])
                was_seen = was_seen | history[:, t].bool()

    history = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    return model, AutoDiagonalNormal(poutine.block(model, expose=["phi", "rho"])), (history,), {}
