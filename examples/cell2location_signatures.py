"""Estimate the signatures of cell types with cell2location and compiled steps.

::

    python examples/cell2location_signatures.py [--steps 500]
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import anndata
import pandas as pd
import pyro
import scvi
import torch
from cell2location.models import RegressionModel
from scvi.train import PyroTrainingPlan

from pyro_ext.infer import CompiledSVI

NUM_CELLS, BATCH_SIZE = 256, 64


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the mean loss of each epoch."""
    pyro.clear_param_store()
    scvi.settings.seed = 0
    labels, batches = torch.randint(4, (NUM_CELLS,)), torch.randint(2, (NUM_CELLS,))
    signatures = 3 * torch.rand(4, 30).exp()
    counts = torch.poisson(signatures[labels] * (1 + batches.unsqueeze(-1)))
    cells = anndata.AnnData(counts.numpy())
    cells.obs["label"] = pd.Categorical(labels.numpy().astype(str))
    cells.obs["batch"] = pd.Categorical(batches.numpy().astype(str))
    RegressionModel.setup_anndata(cells, batch_key="batch", labels_key="label")
    regression = RegressionModel(cells)
    plan = PyroTrainingPlan(regression.module, optim=pyro.optim.ClippedAdam({"lr": 0.01}))
    plan.svi = make_svi(plan.svi.model, plan.svi.guide, plan.optim, plan.loss_fn)
    regression.train(
        max_epochs=math.ceil(steps * BATCH_SIZE / NUM_CELLS),
        batch_size=BATCH_SIZE,
        accelerator="cpu",
        training_plan=plan,
        enable_progress_bar=False,
    )
    return list(regression.history["elbo_train"]["elbo_train"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first epoch: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
