"""Milliseconds for each gradient of annealing, with and without a compiled graph."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.harness import Options, Table, compare
from benchmarks.vae import VAE, random_images
from pyro_ext.infer.annealing.compiled_slopes import chosen_slopes
from pyro_ext.infer.annealing.flat_target import FlatTarget
from pyro_ext.infer.annealing.hmc import ChainState, transition
from pyro_ext.infer.annealing.metric import Metric
from pyro_ext.infer.annealing.unconstrained import UnconstrainedPrograms
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.tracing import Programs

NUM_CHAINS = 16
NUM_LEAPFROG_STEPS = 10


def eight_schools(effects: Tensor, errors: Tensor) -> None:
    """The treatment effects in eight schools, non-centred."""
    mu = pyro.sample("mu", dist.Normal(effects.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(effects.new_tensor(5.0)))
    with pyro.plate("schools", len(effects)):
        z = pyro.sample("z", dist.Normal(effects.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, errors), obs=effects)


def logistic_regression(x: Tensor, y: Tensor) -> None:
    """Twenty coefficients."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


def problems(device: torch.device) -> dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...]]]:
    """Model, guide and arguments by name."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], device=device)
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], device=device)
    x = torch.randn(200, 20, device=device)
    y = (x.sum(-1) > 0).float()
    vae = VAE("vae").to(device)
    return {
        "eight schools": (eight_schools, PriorProposal(eight_schools), (effects, errors)),
        "logistic regression": (logistic_regression, PriorProposal(logistic_regression), (x, y)),
        "VAE, 8 images": (vae.model, vae.guide, (random_images(8, device),)),
    }


@torch.no_grad()
def move(target: FlatTarget, state: ChainState) -> None:
    """A transition of all chains."""
    step_size = torch.full_like(state.densities.log_p[0], 0.01)
    metric = Metric.of_spread(state.positions)
    transition(target, state, 0.5, step_size, metric, NUM_LEAPFROG_STEPS)


def tables(options: Options) -> Iterator[Table]:
    """Time for each gradient, of the transitions that annealing makes."""
    ratio = "ratio of times to uncompiled"
    columns = ["model", "by", "ms a gradient", ratio, "s in the first transition"]
    table = Table("Annealing", columns, chart=(columns[:2], ratio))
    for name, (model, guide, args) in problems(options.device).items():
        densities = UnconstrainedPrograms("benchmark", Programs(model, guide, args), float("inf"))
        steps, first = {}, []
        for by, compile in (("uncompiled", False), ("compile=True", True)):
            target = FlatTarget(densities, None, chosen_slopes("benchmark", compile))
            steps[by] = partial(move, target, ChainState(*target.draw(NUM_CHAINS)))
            started = time.perf_counter()
            steps[by]()
            first.append(time.perf_counter() - started)
        found = compare(steps, options)
        for (by, (milliseconds, times)), seconds in zip(found.items(), first, strict=True):
            a_gradient = milliseconds.median / (NUM_LEAPFROG_STEPS + 1)
            table.rows.append([name, by, a_gradient, times, seconds])
    table.note = (
        f"{NUM_CHAINS} chains, transitions of {NUM_LEAPFROG_STEPS} leapfrog steps. The first "
        "transition makes the graph, and is not part of the other columns."
    )
    yield table
