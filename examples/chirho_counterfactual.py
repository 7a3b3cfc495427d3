"""Fit a causal model with chirho's counterfactual worlds and compiled steps.

::

    python examples/chirho_counterfactual.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from chirho.counterfactual.handlers import MultiWorldCounterfactual
from chirho.interventional.handlers import do
from chirho.observational.handlers import condition
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_ext.infer import CompiledSVI


def causal_model(num_rows: int) -> None:
    """Draw outcomes y of doses t, both of which depend on a confounder u."""
    effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    confounding = pyro.sample("confounding", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", num_rows, dim=-1):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        t = pyro.sample("t", dist.Normal(u, 1.0))
        pyro.sample("y", dist.Normal(effect * t + confounding * u, 0.5))


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    u = torch.randn(100)
    t = u + torch.randn(100)
    y = 1.5 * t - u + 0.5 * torch.randn(100)
    data: dict[str, Tensor] = {"t": t, "y": y}
    observed = condition(causal_model, data=data)

    def model(num_rows: int) -> None:
        """Score the data in the actual world, and draw those of the world without a dose."""
        with MultiWorldCounterfactual(-2), do(actions={"t": torch.tensor(0.0)}):
            observed(num_rows)

    guide = AutoNormal(observed)
    svi = make_svi(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step(len(t)) for _ in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
