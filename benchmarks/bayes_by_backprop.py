"""A Bayes-by-Backprop step, over the same step in plain PyTorch.

A 784-400-400-10 network with the scale-mixture prior, a batch of 128, fused Adam, validation off.
Then 8 particles, vectorised over looped, and the log density of the prior at all weights, forward
and backward. blitz-bayesian-pytorch and bayesian-torch take part where they are installed; what is
used of them needs none of their dependencies but torch:

    pip install --no-deps blitz-bayesian-pytorch bayesian-torch
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Options, Step, Table, compare, with_fused_kernels
from pyro_ext.distributions import NormalScaleMixture
from pyro_ext.infer import CompiledSVI, GeometricKL, ImportanceWeightedELBO, KLWeightedELBO
from pyro_ext.nn import BayesianModule, MeanFieldGuide, flipout, local_reparameterization

SIZES = 784, 400, 400, 10
BATCH_SIZE, NUM_DATA = 128, 60_000
SCALES, PROBS = (1.0, math.exp(-6)), (0.5, 0.5)


def make_network() -> nn.Sequential:
    """The network, with rectified linear units."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(SIZES):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH_SIZE, SIZES[0], generator=generator)
    y = torch.randint(SIZES[-1], (BATCH_SIZE,), generator=generator)
    return x.to(device), y.to(device)


class PlainNetwork(nn.Module):
    """Bayes by Backprop by hand, as one would write it in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.locs = nn.ParameterList(p.detach().clone() for p in make_network().parameters())
        self.rhos = nn.ParameterList(torch.full_like(p, -3.0) for p in self.locs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of one draw."""
        weights, kl = [], x.new_zeros(())
        for loc, rho in zip(self.locs, self.rhos, strict=True):
            scale = F.softplus(rho)
            noise = torch.randn_like(loc)
            weight = loc + scale * noise
            log_q = -noise.square() / 2 - scale.log() - math.log(2 * math.pi) / 2
            log_p = torch.logaddexp(
                *(
                    math.log(prob / s / math.sqrt(2 * math.pi)) - (weight / s).square() / 2
                    for prob, s in zip(PROBS, SCALES, strict=True)
                )
            )
            kl = kl + (log_q - log_p).sum()
            weights.append(weight)
        for i in range(0, len(weights), 2):
            x = F.linear(x if i == 0 else x.relu(), weights[i], weights[i + 1])
        return NUM_DATA / len(x) * F.cross_entropy(x, y, reduction="sum") + kl


class Model(nn.Module):
    """The same in Pyro."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.net = BayesianModule(make_network(), prior)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Draws the labels of a minibatch."""
        logits = self.net(x)
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def torch_step(loss: Callable[[], Tensor], module: nn.Module) -> Step:
    """A step of fused Adam."""
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def pyro_step(elbo: Any, prior: Any, device: torch.device) -> Step:
    """A step of an objective through its module interface."""
    model = Model(prior).to(device)
    guide = MeanFieldGuide(model.net)
    module = elbo(model, guide)
    x, y = batch(device)
    return torch_step(lambda: module(x, y), module)


def others(device: torch.device) -> dict[str, Step]:
    """The steps of other libraries, where they are installed."""
    steps = {}
    x, y = batch(device)

    def likelihood(logits: Tensor) -> Tensor:
        return NUM_DATA / BATCH_SIZE * F.cross_entropy(logits, y, reduction="sum")

    if importlib.util.find_spec("blitz") is not None:
        from blitz.modules import BayesianLinear
        from blitz.utils import variational_estimator

        @variational_estimator
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                pairs = itertools.pairwise(SIZES)
                self.layers = nn.ModuleList(BayesianLinear(*pair) for pair in pairs)

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers[:-1]:
                    x = layer(x).relu()
                return self.layers[-1](x)

        blitz: Any = Network().to(device)
        steps["blitz"] = torch_step(lambda: likelihood(blitz(x)) + blitz.nn_kl_divergence(), blitz)
    if importlib.util.find_spec("bayesian_torch") is not None:
        from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

        net = make_network()
        options = {
            "prior_mu": 0.0,
            "prior_sigma": 1.0,
            "posterior_mu_init": 0.0,
            "posterior_rho_init": -3.0,
            "type": "Reparameterization",
            "moped_enable": False,
        }
        dnn_to_bnn(net, options)
        net.to(device)
        steps["bayesian-torch (closed-form KL)"] = torch_step(
            lambda: likelihood(net(x)) + get_kl_loss(net), net
        )
    return steps


def compiled_step(prior: Any, device: torch.device) -> Step:
    """A step of ``CompiledSVI``."""
    model = Model(prior).to(device)
    guide = MeanFieldGuide(model.net)
    x, y = batch(device)
    svi = CompiledSVI(model, lambda x, y: guide(x), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    svi.step(x, y)
    return lambda: svi.step(x, y)


def under(handler: Any, step: Step) -> Step:
    """A step inside of a handler."""

    def handled() -> None:
        with handler():
            step()

    return handled


def tables(options: Options) -> Iterator[Table]:
    """One draw against other libraries; eight draws against a loop."""
    device = options.device
    scales, probs = (torch.tensor(values, device=device) for values in (SCALES, PROBS))
    mixture = NormalScaleMixture(scales, probs=probs)
    x, y = batch(device)

    def pyro_steps(elbo: Callable[[], Any], prior: Any = mixture) -> Step:
        pyro.clear_param_store()
        return pyro_step(elbo(), prior, device)

    plain = PlainNetwork().to(device)
    normal = dist.Normal(0.0, 1.0)
    with pyro.validation_enabled(False):
        steps = {
            "plain PyTorch": torch_step(lambda: plain(x, y), plain),
            "CompiledSVI, Trace_ELBO": under(
                lambda: pyro.settings.context(module_local_params=False),
                compiled_step(mixture, device),
            ),
        }
        with pyro.settings.context(module_local_params=True):
            steps |= {
                "Trace_ELBO": pyro_steps(Trace_ELBO),
                "KLWeightedELBO(Trace_ELBO)": pyro_steps(
                    lambda: KLWeightedELBO(Trace_ELBO(), GeometricKL(469))
                ),
                "ImportanceWeightedELBO(1)": pyro_steps(lambda: ImportanceWeightedELBO(1)),
                "TraceMeanField_ELBO, normal prior": pyro_steps(TraceMeanField_ELBO, normal),
                "the same with local_reparameterization": under(
                    local_reparameterization, pyro_steps(TraceMeanField_ELBO, normal)
                ),
                "the same with flipout": under(flipout, pyro_steps(TraceMeanField_ELBO, normal)),
                **others(device),
            }
            yield table_of("Bayes by Backprop", steps, "plain PyTorch", options)

            def particles(is_vectorized: bool) -> Step:
                return pyro_steps(
                    lambda: Trace_ELBO(8, vectorize_particles=is_vectorized, max_plate_nesting=1)
                )

            steps = {"looped": particles(False), "vectorised": particles(True)}
            yield table_of("Bayes by Backprop, 8 particles", steps, "looped", options)
    yield prior_table(mixture, options)


def prior_table(mixture: NormalScaleMixture, options: Options) -> Table:
    """The log density of the prior at all weights, and its gradient."""
    num_weights = sum(p.numel() for p in make_network().parameters())
    weights = (0.1 * torch.randn(num_weights, device=options.device)).requires_grad_()

    def step() -> None:
        torch.autograd.grad(mixture.log_prob(weights).sum(), weights)

    steps = {"logaddexp of normals": plain_prior(weights), "NormalScaleMixture": step}
    steps["the same with a fused kernel"] = with_fused_kernels(step)
    title = f"NormalScaleMixture at {num_weights:,} weights"
    return table_of(title, steps, "logaddexp of normals", options)


def plain_prior(weights: Tensor) -> Step:
    """The log density in float32, as one would write it in PyTorch."""

    def step() -> None:
        log_p = torch.logaddexp(
            *(
                math.log(prob / s / math.sqrt(2 * math.pi)) - (weights / s).square() / 2
                for prob, s in zip(PROBS, SCALES, strict=True)
            )
        )
        torch.autograd.grad(log_p.sum(), weights)

    return step


def table_of(title: str, steps: dict[str, Step], base: str, options: Options) -> Table:
    """Times, and ratios to the first step's."""
    ratio = f"ratio to {base}"
    table = Table(title, ["step", "ms", ratio], chart=(("step",), ratio))
    table.rows = [[name, *found] for name, found in compare(steps, options).items()]
    return table
