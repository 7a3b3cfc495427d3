"""Guides with flows, mixtures of guides, and models that a reparametrisation rewrites."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.reparam import (
    ConjugateReparam,
    HaarReparam,
    LatentStableReparam,
    LinearHMMReparam,
    StableReparam,
)
from torch import Tensor

from tests.pyro_programs.program import Pair, program


def banana(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = z[..., 0] + z[..., 1] ** 2
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def with_flow(*flows: dist.TransformModule) -> Pair:
    modules = torch.nn.ModuleList(flows)

    def guide(y: Tensor) -> None:
        pyro.module("flow", modules)
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, list(flows)))

    return banana, guide, (torch.tensor([0.8, 1.2, 1.0]),), {}


@program()
def planar_flow() -> Pair:
    return with_flow(T.planar(2), T.planar(2))


@program()
def block_autoregressive_flow() -> Pair:
    return with_flow(T.block_autoregressive(2))


@program()
def spline_flow() -> Pair:
    return with_flow(T.spline_coupling(2, count_bins=4, hidden_dims=[6]), T.spline(2))


@program()
def boosted_guide() -> Pair:
    """A mixture of guides, as boosting makes them."""

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z**2, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        logits = pyro.param("logits", torch.zeros(2))
        components = dist.Normal(locs, 0.3)
        pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), components))

    return model, guide, (torch.tensor([1.0, 1.3]),), {}


@program()
def stable_reparam() -> Pair:
    """Stable noise, made of Uniform and Exponential draws, around a Levy location."""

    def model(y: Tensor) -> None:
        stability = pyro.sample("stability", dist.Uniform(1.2, 1.9))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        start = pyro.sample("start", dist.Stable(1.5, 0.0, 1.0, 0.0))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Stable(stability, 0.1, scale, start), obs=y)

    rules = {"start": LatentStableReparam(), "y": StableReparam()}
    rewritten = poutine.reparam(model, rules)
    return rewritten, AutoNormal(rewritten), (torch.tensor([0.2, 1.5, -0.4]),), {}


@program()
def conjugate_reparam() -> Pair:
    """A Gamma prior whose update by counts is exact."""

    def model(total: Tensor) -> None:
        with pyro.plate("sites", len(total)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            noise = pyro.sample("noise", dist.Normal(0.0, 0.1))
            pyro.sample("count", dist.Poisson(rate * noise.exp()), obs=total)

    rule = ConjugateReparam(lambda total: dist.Gamma(total + 1.0, 1.0))
    rewritten = poutine.reparam(model, {"rate": rule})
    return rewritten, AutoNormal(rewritten), (torch.tensor([2.0, 0.0, 4.0]),), {}


@program()
def haar_reparam() -> Pair:
    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("time", len(y)):
            step = pyro.sample("step", dist.Normal(0.0, scale))
        walk = step.cumsum(-1)
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(walk, 0.3), obs=y)

    haar = HaarReparam(dim=-1, flip=True, experimental_allow_batch=True)
    rewritten = poutine.reparam(model, {"step": haar})
    return rewritten, AutoNormal(rewritten), (torch.tensor([0.1, 0.4, 0.2, 0.9]),), {}


@program(one_at_a_time=True)
def linear_hmm_reparam() -> Pair:
    """A state space model with StudentT noise, which becomes a Gaussian one."""

    def model(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        eye = torch.eye(1)
        start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        noise = dist.StudentT(3.0, torch.zeros(1), scale.unsqueeze(-1)).to_event(1)
        seen = dist.StudentT(4.0, torch.zeros(1), 0.5).to_event(1)
        hmm = dist.LinearHMM(start, eye, noise, eye, seen, duration=len(y))
        pyro.sample("y", hmm, obs=y)

    student = pyro.infer.reparam.StudentTReparam()
    rule = LinearHMMReparam(trans=student, obs=student)
    rewritten = poutine.reparam(model, {"y": rule})
    return rewritten, AutoDiagonalNormal(rewritten), (torch.randn(4, 1),), {}
