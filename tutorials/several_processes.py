"""
Training on several processes
==============================

``elbo(model, guide)`` is a torch module that returns the loss, so ``DistributedDataParallel`` can
wrap it. Each process takes its share of the minibatch, and the gradients are averaged over
processes. The size of the plate remains the number N of all data points. With B rows in a minibatch
and P processes, each process has B / P rows and scales its bound by N P / B. The average over P
processes has the scale N / B, as for the whole minibatch.

A global latent variable needs one more thing: all processes must draw the same value. In this
tutorial, all processes draw the noise of the whole minibatch from the same seed, and each process
takes the noise of its rows. The run on two processes can therefore be compared with a run on one
process, number by number. ::

    python tutorials/several_processes.py [--smoke] [--no-progress-bar]
        [--output several_processes.png]

This command runs the script on one process, and then starts it on two processes. On a machine with
GPUs, or on several machines, start it with torchrun::

    torchrun --nproc-per-node=2 tutorials/several_processes.py --no-progress-bar

It uses NCCL if there is a GPU for each process, and gloo on the CPU otherwise.
"""

# %%
import argparse
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from figure_style import use_style
from pyro.nn import PyroModule, PyroParam
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from pyro_ext.infer import ImportanceWeightedELBO

BATCH_SIZE = 100
LATENT = 8
NUM_PARTICLES = 5

# %%
# Passing the noise as data
# -------------------------
#
# ``NormalOf`` is a normal distribution whose noise is given. You do not need it in an ordinary run.
# There, each process draws its own local latents. To make the draws of global latents equal, call
# ``pyro.set_rng_seed`` before the draw.


class NormalOf(dist.Normal):
    """A normal distribution with given standard normal noise."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        self.noise = noise
        super().__init__(loc, scale)

    def expand(self, batch_shape: torch.Size, _instance: dist.Normal | None = None) -> "NormalOf":
        return NormalOf(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.loc + self.scale * self.noise


# %%
# Model and guide
# ---------------
#
# This is an autoencoder of grey digits. The scale of the pixels is a global latent variable with
# its own posterior. Given the scale, ``local_plate`` gives each digit a separate bound.


class Model(PyroModule):
    """The pixels depend on latents z and one scale."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.decoder = nn.Sequential(nn.Linear(LATENT, 50), nn.Tanh(), nn.Linear(50, 64))

    def forward(self, x: Tensor, noise: Tensor, shared: Tensor) -> None:
        log_scale = pyro.sample("log_scale", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", self.num_data, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pixels = dist.Normal(self.decoder(z), log_scale.exp().unsqueeze(-1)).to_event(1)
            pyro.sample("x", pixels, obs=x)


class Guide(PyroModule):
    """All latents are normal with given noise."""

    def __init__(self, num_data: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.encoder = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 2 * LATENT))
        self.loc = nn.Parameter(torch.tensor(-1.0))
        self.scale = PyroParam(torch.tensor(0.01), dist.constraints.positive)

    def forward(self, x: Tensor, noise: Tensor, shared: Tensor) -> None:
        pyro.sample("log_scale", NormalOf(self.loc, self.scale, shared))
        with pyro.plate("data", self.num_data, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", NormalOf(loc, log_scale.exp(), noise).to_event(1))


# %%
# Training on one process or on several
# -------------------------------------
#
# Every process makes the same minibatches and noise, and takes its share of the rows.


def batches(images: Tensor, num_steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return minibatches and noise, which are the same in each process."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num_steps):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(NUM_PARTICLES, BATCH_SIZE, LATENT, generator=generator)
        found.append((images[rows], noise, torch.randn((), generator=generator)))
    return found


def train(num_steps: int, hide_bar: bool) -> dict[str, Tensor | list[float]]:
    """Train in this process. In a group of processes, use a share of each minibatch."""
    rank, size, device = 0, 1, torch.device("cpu")
    if distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        if distributed.get_backend() == "nccl":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    images = torch.tensor(load_digits().data / 16).float()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = ImportanceWeightedELBO(NUM_PARTICLES, local_plate="data", max_plate_nesting=1)
    module = elbo(Model(len(images)), Guide(len(images))).to(device)
    step = DistributedDataParallel(module) if size > 1 else module
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
    losses = []
    for x, noise, shared in tqdm(batches(images, num_steps), disable=hide_bar or rank > 0):
        mine = slice(rank * BATCH_SIZE // size, (rank + 1) * BATCH_SIZE // size)
        optimizer.zero_grad()
        loss = step(x[mine].to(device), noise[:, mine].to(device), shared.to(device))
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if size > 1:
            distributed.all_reduce(total)
        losses.append(total.item() / size / len(images))
    state = {name: value.detach().cpu() for name, value in module.named_parameters()}
    return {
        "parameters": torch.cat([value.flatten() for value in state.values()]),
        "losses": losses,
    }


def train_in_group(num_steps: int, hide_bar: bool, result: str) -> None:
    """Train in a process that torchrun started. The first process saves the result."""
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    distributed.init_process_group("nccl" if has_gpus else "gloo")
    found = train(num_steps, hide_bar)
    if distributed.get_rank() == 0:
        torch.save(found, result)
    gc.collect()  # a module that outlives the group would end the process with an abort
    distributed.barrier()
    distributed.destroy_process_group()


def start_group(num_processes: int, num_steps: int, hide_bar: bool) -> dict:
    """Start this script with torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.pt"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={num_processes}", sys.argv[0]),
            *(f"--steps={num_steps}", f"--result={result}"),
            *(["--no-progress-bar"] if hide_bar else []),
        ]
        subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        return torch.load(result)


# %%
# The figure
# ----------


def draw_figure(one: dict, two: dict, output: str) -> None:
    """Draw the losses, and the final parameters against each other."""
    use_style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    left.plot(one["losses"], linewidth=5, alpha=0.4, label="one process")
    left.plot(two["losses"], linewidth=1.2, label="two processes")
    left.set(
        title="Two processes have the same losses\nas one process",
        xlabel="training steps",
        ylabel="loss, nats per digit",
    )
    left.legend()
    right.plot(one["parameters"], two["parameters"], ".")
    right.set(
        title="They end with the same parameters",
        xlabel="value on one process",
        ylabel="value on two processes",
    )
    figure.savefig(output)
    print(f"\nFigure: {output}")


# %%
# Running the tutorial
# --------------------


def main() -> None:
    """Train on one process and on two processes, and compare."""
    parser = argparse.ArgumentParser(description="One process and several.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--result", default="several_processes.pt", help="path of the result under torchrun"
    )
    parser.add_argument("--smoke", action="store_true", help="20 steps")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="several_processes.png", help="path of the figure")
    arguments = parser.parse_args()
    num_steps = 20 if arguments.smoke else arguments.steps
    if "LOCAL_WORLD_SIZE" in os.environ:
        train_in_group(num_steps, arguments.no_progress_bar, arguments.result)
        return
    one = train(num_steps, arguments.no_progress_bar)
    two = start_group(2, num_steps, arguments.no_progress_bar)
    difference = (one["parameters"] - two["parameters"]).abs().max()
    print("Loss of the last step, nats per digit")
    print(f"  one process    {one['losses'][-1]:.5f}")
    print(f"  two processes  {two['losses'][-1]:.5f}")
    print(f"Largest difference between parameters after {num_steps} steps: {difference:.1e}")
    draw_figure(one, two, arguments.output)


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/thumbnails/several_processes.png"

# %%
# Findings
# --------
#
# - Two processes end with the same parameters as one process. The differences are rounding errors
#   of sums in a different order.
# - Model, guide and estimator do not depend on the number of processes. You have to ensure two
#   things: each process gets its own rows, and all processes draw the same global latents.
