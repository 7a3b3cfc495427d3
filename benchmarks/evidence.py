"""Draws times data points a second of estimate_evidence, over a loop in plain PyTorch; and memory.

    python benchmarks/evidence.py [--device cuda] [--rounds 15]

The loop encodes the images once, and draws, decodes and weighs chunk by chunk without a graph.
Both take turns; times are the shortest of the rounds, for waits for memory only add. The memory is
the peak of all tensors, at many draws over few.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable

import pyro
import torch
from chunk_memory import LiveBytes
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from vae import VAE, random_images

from pyro_ext.infer import estimate_evidence

NUM_POINTS = 64


@torch.no_grad()
def loop(vae: VAE, x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
    """The log evidence of each image, without Pyro."""
    loc, log_scale = vae.encoder(x).chunk(2, dim=-1)
    q = Normal(loc, log_scale.exp())
    prior = Normal(torch.zeros_like(loc), 1.0)
    total = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    for _ in range(num_samples // chunk_size):
        z = q.sample((chunk_size,))
        likelihood = Bernoulli(logits=vae.decoder(z), validate_args=False)
        log_w = likelihood.log_prob(x).sum(-1) + (prior.log_prob(z) - q.log_prob(z)).sum(-1)
        total = torch.logaddexp(total, log_w.double().logsumexp(0))
    return total - math.log(num_samples)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The time of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def print_throughput(vae: VAE, x: Tensor, rounds: int) -> None:
    """A row for each chunk size."""
    print("chunk size | loop, draws x points a second | estimate_evidence | ratio")
    for chunk_size, num_samples in ((10, 1000), (100, 2000), (1000, 4000)):

        def ours(num_samples: int = num_samples, chunk_size: int = chunk_size) -> object:
            return estimate_evidence(
                vae.model,
                vae.guide,
                x,
                num_samples=num_samples,
                chunk_size=chunk_size,
                max_plate_nesting=1,
            )

        def theirs(num_samples: int = num_samples, chunk_size: int = chunk_size) -> object:
            return loop(vae, x, num_samples, chunk_size)

        ours(), theirs()
        pairs = [(seconds(theirs, x.device), seconds(ours, x.device)) for _ in range(rounds)]
        slow, fast = (min(times) for times in zip(*pairs, strict=True))
        rates = [num_samples * NUM_POINTS / t for t in (slow, fast)]
        print(f"{chunk_size} | {rates[0]:.3g} | {rates[1]:.3g} | {slow / fast:.2f}")


def peak_bytes(vae: VAE, x: Tensor, num_samples: int) -> int:
    """The peak of all tensors but the parameters and data."""
    options = {"num_samples": num_samples, "chunk_size": 100, "max_plate_nesting": 1}
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        estimate_evidence(vae.model, vae.guide, x, **options)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes([*vae.parameters(), x]) as memory:
        estimate_evidence(vae.model, vae.guide, x, **options)
    return memory.peak


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    warnings.filterwarnings("ignore", message=".*Pareto k")  # the network is not trained
    torch.set_flush_denormal(True)
    pyro.set_rng_seed(0)
    vae = VAE("vae").to(device)
    print_throughput(vae, random_images(NUM_POINTS, device), arguments.rounds)
    few, many = (peak_bytes(vae, random_images(8, device), n) for n in (1000, 60_000))
    print(f"peak memory, 8 points, chunks of 100: {few / 2**20:.2f} MiB at 1,000 draws, ", end="")
    print(f"{many / 2**20:.2f} MiB at 60,000: {many / few:.3f}")


if __name__ == "__main__":
    main()
