"""Fit factors to two groups of samples with MOFA-FLEX and compiled steps.

MOFA-FLEX makes its ``SVI`` itself. The script puts ``CompiledSVI`` in its place. ::

    python examples/mofaflex_factors.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import anndata
import mofaflex
import pyro
import torch

from pyro_ext.infer import CompiledSVI


def train(steps: int, make_svi: Callable[..., Any] = CompiledSVI) -> list[float]:
    """Return the loss of each step."""
    pyro.set_rng_seed(0)
    factors = torch.randn(100, 3)
    views = {
        name: anndata.AnnData((factors @ torch.randn(3, n) + 0.1 * torch.randn(100, n)).numpy())
        for name, n in (("rna", 30), ("protein", 20))
    }
    with patch("mofaflex._core.mofaflex.SVI", make_svi):
        model = mofaflex.MOFAFLEX(
            {"cells": views},
            mofaflex.DataOptions(plot_data_overview=False),
            mofaflex.ModelOptions(n_factors=3, weight_prior="Horseshoe"),
            mofaflex.TrainingOptions(
                max_epochs=steps, lr=0.02, early_stopper_patience=0, seed=0, save_path=False
            ),
        )
    return [float(loss) for loss in model.training_loss]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
