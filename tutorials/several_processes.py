"""
Training on several processes
==============================

This script trains on one process or on several. You start it with ``python`` or with torchrun.
``CompiledSVI.run`` gives each process its rows of each minibatch and averages the gradients.
``estimate_evidence`` divides the held-out digits. ::

    python tutorials/several_processes.py [--smoke] [--no-progress-bar]
        [--output several_processes.png]
    torchrun --nproc-per-node=2 tutorials/several_processes.py [--checkpoint several_processes.pt]

The first command trains on one process. It then starts itself with torchrun, compares the losses,
and draws the figure. The second command only trains. If its checkpoint exists, it resumes it, also
with another number of processes. It uses NCCL if there is a GPU for each process, and gloo on the
CPU otherwise.

:doc:`/guide/many_machines` explains how rows and draws are divided, and how to use several
machines.
"""

# %%
import argparse
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from figure_style import use_style
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler

from pyro_ext.distributed import DistributedNoise
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, estimate_evidence

BATCH_SIZE = 100
NUM_TRAIN = 1600
LATENT = 8

# %%
# Model and guide
# ---------------
#
# This is an autoencoder of grey digits. The scale of the pixels is a global latent variable with
# its own posterior, so all processes must draw the same value. Each digit has local latents. The
# size of the plate is the number of all training digits, on any number of processes.


class Model(PyroModule):
    """The pixels depend on latents z and one scale."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(LATENT, 200), nn.Tanh(), nn.Linear(200, 64))

    def forward(self, x: Tensor) -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", NUM_TRAIN, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pixels = dist.Normal(self.decoder(z), log_scale.exp().unsqueeze(-1)).to_event(1)
            pyro.sample("x", pixels, obs=x)


class Guide(PyroModule):
    """All latents are normal."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 2 * LATENT))
        self.loc = nn.Parameter(torch.tensor(-1.0))
        self.scale = PyroParam(torch.tensor(0.01), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        pyro.sample("log_scale", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", NUM_TRAIN, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def make_svi(device: torch.device, backend: str) -> CompiledSVI:
    """Return an SVI with new parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = ImportanceWeightedELBO(20, local_plate="data", max_plate_nesting=1)
    programs = Model().to(device), Guide().to(device)
    return CompiledSVI(*programs, pyro.optim.Adam({"lr": 1e-3}), elbo, backend=backend)


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the training digits and the held-out digits."""
    images = torch.tensor(load_digits().data / 16).float().to(device)
    return images[:NUM_TRAIN], images[NUM_TRAIN:]


# %%
# Training and evidence
# ---------------------
#
# ``batch_size`` is the number of rows of each process. Dividing it by the number of processes keeps
# the size of the minibatch. The evidence of each held-out digit is conditional on the scale, which
# has its posterior mode. All processes get the evidence of all digits.


def given_scale(svi: CompiledSVI) -> list[Callable[..., None]]:
    """Return model and guide for the posterior mode of the scale."""
    model = poutine.condition(svi.model, data={"log_scale": svi.guide.loc.detach()})
    return [poutine.block(program, hide=["log_scale"]) for program in (model, svi.guide)]


def train_and_estimate(device: torch.device, options: argparse.Namespace) -> CompiledSVI:
    """Train, and print the evidence of held-out digits."""
    rank, size = rank_and_size()
    train, held_out = digits(device)
    svi = make_svi(device, options.backend)
    checkpoint = options.checkpoint
    history = svi.run(
        DataLoader(train, batch_size=BATCH_SIZE // size, shuffle=True),
        options.num_epochs,
        not options.no_progress_bar,
        checkpoint=checkpoint,
        resume=checkpoint if Path(checkpoint).exists() else None,
    )
    evidence = estimate_evidence(
        *given_scale(svi),
        data_loader=DataLoader(held_out, batch_size=50),
        num_rows=len(held_out),
    )
    if rank == 0:
        loss = history.last_epoch_loss / NUM_TRAIN
        log_evidence = evidence.log_evidence.mean()
        print(f"{size:9}  {loss:21.2f}  {log_evidence:22.2f}", flush=True)
    return svi


# %%
# The same curve on any number of processes
# -----------------------------------------
#
# To compare runs number by number, they need the same minibatches and the same draws.
# ``DistributedSampler`` makes the first, and ``DistributedNoise`` with ``per_row=True`` the second.
# This is slow, and an ordinary run does not need it.


def losses_of_equal_draws(device: torch.device, num_epochs: int) -> list[float]:
    """Return the losses of a run whose draws do not depend on the number of processes."""
    rank, size = rank_and_size()
    train, _ = digits(device)
    sampler = DistributedSampler(train, size, rank, seed=0)
    loader = DataLoader(train, batch_size=BATCH_SIZE // size, sampler=sampler)
    svi = make_svi(device, "eager")
    with DistributedNoise("data", seed=0, per_row=True):
        return svi.run(loader, num_epochs, progress_bar=False).losses


# %%
# Rows per second
# ---------------
#
# Here each process has 100 rows, so the minibatch grows with the number of processes.


def rows_per_second(svi: CompiledSVI, device: torch.device) -> float:
    """Return how many rows all processes take per second."""
    rank, size = rank_and_size()
    x = digits(device)[0][rank::size][:BATCH_SIZE]
    times = []
    for _ in range(200):
        svi.step(x)  # its loss is a number, so the step is complete
        times.append(time.perf_counter())
    return size * BATCH_SIZE / statistics.median(map(operator.sub, times[101:], times[100:]))


# %%
# Processes of torchrun
# ---------------------


def train_in_group(options: argparse.Namespace) -> None:
    """Train in a process that torchrun started. Rank 0 saves the measurements, if there are any."""
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cpu")
    if has_gpus:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if has_gpus else "gloo", timeout=timedelta(minutes=5))
    svi = train_and_estimate(device, options)
    if options.result is not None:
        speed = rows_per_second(svi, device)  # first, because the next line clears the param store
        losses = losses_of_equal_draws(device, min(options.num_epochs, 10))
        found = {"losses": losses, "rows per second": speed}
        if distributed.get_rank() == 0:
            torch.save(found, options.result)
    distributed.destroy_process_group()


def start_group(num_processes: int, folder: str) -> dict[str, Any]:
    """Start this script with torchrun, and return the measurements."""
    result = Path(folder) / f"{num_processes}.result"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={num_processes}", *sys.argv),
        *(f"--checkpoint={folder}/{num_processes}.pt", f"--result={result}"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return torch.load(result)


# %%
# The figure
# ----------


def draw_figure(found: dict[int, dict[str, Any]], output: str) -> None:
    """Draw the losses of one and of two processes, and the rows per second."""
    use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for size, width, alpha in ((1, 5, 0.4), (2, 1.2, 1)):
        losses = [loss / NUM_TRAIN for loss in found[size]["losses"]]
        label = "two processes" if size > 1 else "one process"
        left.plot(losses, linewidth=width, alpha=alpha, label=label)
    left.set(
        title="Two processes have the losses\nof one process",
        xlabel="training steps",
        ylabel="loss, nats per digit",
    )
    left.legend()
    sizes = list(found)
    speeds = [found[size]["rows per second"] for size in sizes]
    right.plot(sizes, [size * speeds[0] for size in sizes], "--", color="grey", label="ideal")
    right.plot(sizes, speeds, "o-", label="measured")
    right.set(
        title="Rows per second with equal work\nper process",
        xlabel="processes of one thread, 100 rows each",
        ylabel="rows per second",
        xticks=sizes,
        ylim=(0, None),
    )
    right.legend()
    figure.savefig(output)
    print(f"\nFigure: {output}")


# %%
# Running the tutorial
# --------------------


def main() -> None:
    """Train on one process and on several, and compare."""
    parser = argparse.ArgumentParser(description="One process and several.")
    parser.add_argument("--smoke", action="store_true", help="few steps, without a compiler")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="several_processes.png", help="path of the figure")
    parser.add_argument("--checkpoint", default="several_processes.pt", help="under torchrun")
    parser.add_argument("--result", help="path of measurements under torchrun")
    options = parser.parse_args()
    options.num_epochs, options.backend = (2, "eager") if options.smoke else (20, "inductor")
    torch.set_flush_denormal(True)
    # The guide is too narrow for a few digits.
    warnings.filterwarnings("ignore", message=".*Pareto k")
    if "LOCAL_WORLD_SIZE" in os.environ:
        train_in_group(options)
        return
    print("processes  loss, nats per digit  held-out log evidence")
    with tempfile.TemporaryDirectory() as folder:
        options.checkpoint = f"{folder}/run.pt"
        train_and_estimate(torch.device("cpu"), options)
        sizes = [1, 2, 4] if (os.cpu_count() or 1) >= 4 else [1, 2]
        found = {size: start_group(size, folder) for size in sizes}
    one, two = (found[size]["losses"] for size in (1, 2))
    gap = max(abs(x - y) / abs(x) for x, y in zip(one, two, strict=True))
    print(f"Largest relative difference of the losses, with equal draws: {gap:.1e}")
    draw_figure(found, options.output)


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/thumbnails/several_processes.png"
