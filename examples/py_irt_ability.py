"""Estimate abilities and difficulties with py-irt and compiled steps.

::

    python examples/py_irt_ability.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any

import py_irt.models  # noqa: F401  registers the models
import pyro
import torch
from py_irt.models.abstract_model import IrtModel
from pyro.infer import Trace_ELBO

from pyro_ext.infer import CompiledSVI


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    ability, difficulty = torch.randn(60), torch.randn(20)
    subjects = torch.arange(60).repeat_interleave(20)
    items = torch.arange(20).repeat(60)
    responses = torch.bernoulli(torch.sigmoid(ability[subjects] - difficulty[items]))
    irt = IrtModel.from_name("2pl")(priors="hierarchical", num_items=20, num_subjects=60)
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.999}
    )
    svi = make_svi(irt.get_model(), irt.get_guide(), optim, loss=Trace_ELBO())
    losses = []
    for _ in range(steps):
        losses.append(svi.step(subjects, items, responses))
        optim.step()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
