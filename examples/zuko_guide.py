"""Use a conditional spline flow of zuko as the guide, with compiled steps.

::

    python examples/zuko_guide.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO


def model(x: Tensor) -> None:
    """Draw points on a ring, of which the length and one coordinate are measured."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        means = torch.stack([z.norm(dim=-1), z[..., 0]], -1)
        pyro.sample("x", dist.Normal(means, 0.5).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flow = zuko.flows.NSF(2, context=2, transforms=2, hidden_features=(32, 32))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(self.flow(x)))


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    z = torch.randn(200, 2)
    x = torch.stack([z.norm(dim=-1), z[:, 0]], -1) + 0.5 * torch.randn(200, 2)
    optim = pyro.optim.Adam({"lr": 0.005})
    svi = make_svi(model, Guide(), optim, ImportanceWeightedELBO(4))
    return [svi.step(x) for _ in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
