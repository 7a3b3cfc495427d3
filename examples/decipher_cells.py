"""Embed cells with Decipher and compiled steps.

::

    python examples/decipher_cells.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any

import anndata
import pyro
import torch
from decipher.tools._decipher import Decipher, DecipherConfig
from pyro.infer import Trace_ELBO

from pyro_ext.infer import CompiledSVI

BATCH_SIZE = 64


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    rates = (torch.randn(256, 2) @ torch.randn(2, 30)).exp()
    counts = torch.poisson(rates)
    config = DecipherConfig()
    config.initialize_from_adata(anndata.AnnData(counts.numpy()))
    decipher = Decipher(config)
    optim = pyro.optim.ClippedAdam({"lr": 0.005, "weight_decay": 1e-4})
    svi = make_svi(decipher.model, decipher.guide, optim, Trace_ELBO())
    batches = counts.split(BATCH_SIZE)
    losses = []
    for step in range(steps):
        # Decipher's own loop freezes the batch norms after the first epoch.
        for module in decipher.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.train(step < len(batches))
        losses.append(svi.step(batches[step % len(batches)]))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
