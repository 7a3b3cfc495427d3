"""
Training on several processes
==============================

``elbo(model, guide)`` is a torch module that returns the loss, and so
``DistributedDataParallel`` can wrap it: each process takes its share of the minibatch, and
gradients are averaged. The plate's size stays that of all the data. With B / P of N rows, a process
scales its bound by N P / B, and the average over P processes is the N / B of the whole minibatch.

A global latent variable asks for one thing more: each process has to draw the same value. Here
noise is drawn for the whole minibatch from a seed that all share, and each process takes its rows;
so the run on two processes can be compared with one on a single process, number by number. ::

    python tutorials/several_processes.py [--smoke] [--no-progress-bar]
        [--output several_processes.png]

starts itself twice. On a machine with GPUs, or on several machines, torchrun does::

    torchrun --nproc-per-node=2 tutorials/several_processes.py --no-progress-bar

with NCCL where there is a GPU for each process, else with gloo on the CPU.
"""

# %%
import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
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
# The noise as data
# -----------------
#
# A normal whose draw is given. In an ordinary run this class is not needed: local latents may be
# drawn by each process as it likes, and ``pyro.set_rng_seed`` before a draw makes globals equal.


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
# An autoencoder of grey digits. The scale of the pixels is global, with a posterior of its own, and
# ``local_plate`` gives each digit a bound of its own given it.


class Model(PyroModule):
    """Pixels given latents z and one scale."""

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
    """Normals; the noise is given."""

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
# One process of several, or the only one
# ---------------------------------------
#
# Every process makes the same minibatches and noise, and takes its share of the rows.


def batches(images: Tensor, num_steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same in each process."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num_steps):
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        noise = torch.randn(NUM_PARTICLES, BATCH_SIZE, LATENT, generator=generator)
        found.append((images[rows], noise, torch.randn((), generator=generator)))
    return found


def train(num_steps: int, hide_bar: bool) -> dict[str, Tensor | list[float]]:
    """Trains in this process; in a group of processes, on its share of each minibatch."""
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
    """As a process that torchrun has started; the first one saves the result."""
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    distributed.init_process_group("nccl" if has_gpus else "gloo")
    found = train(num_steps, hide_bar)
    if distributed.get_rank() == 0:
        torch.save(found, result)
    distributed.destroy_process_group()


def start_group(num_processes: int, num_steps: int, hide_bar: bool) -> dict:
    """Starts this script by torchrun."""
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
    """Losses, and parameters against parameters."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(one["losses"], linewidth=4, alpha=0.4, label="one process")
    left.plot(two["losses"], linewidth=1, label="two processes")
    left.set(title="Loss", xlabel="step", ylabel="nats per digit")
    left.legend()
    right.plot(one["parameters"], two["parameters"], ".", markersize=3)
    right.set(title="Parameters at the end", xlabel="one process", ylabel="two processes")
    figure.savefig(output, dpi=120)
    print(f"\nFigure: {output}")


# %%
# All of it
# ---------


def main() -> None:
    """Trains on one process and on two, and compares."""
    parser = argparse.ArgumentParser(description="One process and several.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--result", default="several_processes.pt", help="under torchrun")
    parser.add_argument("--smoke", action="store_true", help="20 steps")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="several_processes.png", help="where the figure goes")
    arguments = parser.parse_args()
    num_steps = 20 if arguments.smoke else arguments.steps
    if "LOCAL_WORLD_SIZE" in os.environ:
        train_in_group(num_steps, arguments.no_progress_bar, arguments.result)
        return
    one = train(num_steps, arguments.no_progress_bar)
    two = start_group(2, num_steps, arguments.no_progress_bar)
    difference = (one["parameters"] - two["parameters"]).abs().max()
    print(f"Loss of the last step: {one['losses'][-1]:.5f} and {two['losses'][-1]:.5f} nats")
    print(f"Largest difference of a parameter after {num_steps} steps: {difference:.1e}")
    draw_figure(one, two, arguments.output)


if __name__ == "__main__":
    main()

# %%
# What was learnt
# ---------------
#
# - Two processes end with the parameters of one, up to the rounding of sums in another order.
# - Neither model, guide nor estimator knows of the processes. What they have to get right is that
#   each sees rows of its own and that all draw the same globals.
