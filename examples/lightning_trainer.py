"""Train an importance-weighted autoencoder with Lightning's Trainer and compiled steps.

::

    python examples/lightning_trainer.py [--steps 500]
"""

import argparse
from collections.abc import Callable
from typing import Any

import lightning
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pyro_ext.infer import ImportanceWeightedELBO, compile_elbo

NUM_ROWS, BATCH_SIZE = 1000, 100


class Model(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", NUM_ROWS, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", NUM_ROWS, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Training(lightning.LightningModule):
    def __init__(self, compile: Callable[..., Any]) -> None:
        super().__init__()
        self.loss = compile(ImportanceWeightedELBO(5))(Model(), Guide())
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("validation loss", self.loss(batch))  # without gradients: a second graph

    def on_train_end(self) -> None:
        if hasattr(self.loss, "audit"):
            self.loss.audit()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)


def train(steps: int, compile: Callable[..., Any] = compile_elbo) -> list[float]:
    """Return the loss of each step."""
    pyro.set_rng_seed(0)
    rows = (torch.randn(NUM_ROWS, 2) @ torch.randn(2, 10)).sin() + 0.5 * torch.randn(NUM_ROWS, 10)
    training = Training(compile)
    trainer = lightning.Trainer(
        max_steps=steps,
        gradient_clip_val=1000.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(rows, batch_size=BATCH_SIZE, shuffle=True)
    trainer.fit(training, loader, DataLoader(rows, batch_size=BATCH_SIZE))
    return training.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    losses = train(parser.parse_args().steps)
    print(f"loss of the first step: {losses[0]:.1f}, of the last: {losses[-1]:.1f}")
