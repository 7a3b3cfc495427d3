"""Train the amortised LDA of scvi-tools with compiled steps.

::

    python examples/scvi_amortized_lda.py [--steps 500]
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import anndata
import pyro
import scvi
import torch
from scvi.model import AmortizedLDA
from scvi.train import LowLevelPyroTrainingPlan
from torch import Tensor

from pyro_ext.infer import compile_elbo

NUM_CELLS, BATCH_SIZE = 512, 128


def train(steps: int, compile: Callable[..., Any] = compile_elbo) -> list[float]:
    """Return the mean loss of each epoch."""
    pyro.clear_param_store()
    scvi.settings.seed = 0
    topics = torch.distributions.Dirichlet(torch.full((50,), 0.1)).sample((5,))
    weights = torch.distributions.Dirichlet(torch.full((5,), 0.3)).sample((NUM_CELLS,))
    counts = torch.poisson(300 * weights @ topics)
    cells = anndata.AnnData(counts.numpy())
    AmortizedLDA.setup_anndata(cells)
    lda = AmortizedLDA(cells, n_topics=5, n_hidden=32)
    plan = LowLevelPyroTrainingPlan(lda.module, optim_kwargs={"lr": 0.01})
    loss = compile(plan.loss_fn)(lda.module.model, lda.module.guide)
    largest = counts.sum(-1).max()

    def loss_of_batch(model: Any, guide: Any, x: Tensor, library: Tensor, **kwargs: Any) -> Tensor:
        # The model reads the largest library of each minibatch as a Python number, which the loss
        # does not depend on. Each other number would need another graph.
        batch_loss: Tensor = loss(x, torch.full_like(library, largest), **kwargs)
        return batch_loss

    plan.differentiable_loss_fn = loss_of_batch
    lda.train(
        max_epochs=math.ceil(steps * BATCH_SIZE / NUM_CELLS),
        batch_size=BATCH_SIZE,
        train_size=1.0,
        accelerator="cpu",
        training_plan=plan,
        enable_progress_bar=False,
    )
    return list(lda.history["elbo_train"]["elbo_train"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first epoch: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
