"""Draws times data points a second of estimate_evidence, over a loop in plain PyTorch; and memory.

The loop encodes the images once, and draws, decodes and weighs chunk by chunk without a graph.
"""

import math
import time
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from benchmarks.harness import Options, Table, compare, peak_bytes
from benchmarks.vae import VAE, random_images
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


def tables(options: Options) -> Iterator[Table]:
    """Throughput for three chunk sizes, and memory at many draws over few."""
    vae = VAE("vae").to(options.device)
    x = random_images(NUM_POINTS, options.device)
    rate = "draws x images a second"
    ratio = "ratio of times to the loop's"
    table = Table(
        "Evidence", ["chunk size", "by", rate, ratio], chart=(("chunk size", "by"), ratio)
    )

    def estimate(x: Tensor, num_samples: int, chunk_size: int, compile: bool = False) -> object:
        return estimate_evidence(
            vae.model,
            vae.guide,
            x,
            num_samples=num_samples,
            chunk_size=chunk_size,
            compile=compile,
            max_plate_nesting=1,
        )

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Pareto k")  # the network is not trained
        first_calls = []
        for chunk_size, num_samples in ((10, 500), (100, 2000), (1000, 8000)):
            settings = {"num_samples": num_samples, "chunk_size": chunk_size}
            steps = {
                "loop": partial(loop, vae, x, **settings),
                "estimate_evidence": partial(estimate, x, **settings),
                "estimate_evidence, compiled": partial(estimate, x, compile=True, **settings),
            }
            started = time.perf_counter()
            steps["estimate_evidence, compiled"]()
            first_calls.append(f"{time.perf_counter() - started:.2g}")
            for name, (milliseconds, times) in compare(steps, options).items():
                draws_a_second = 1e3 * num_samples * NUM_POINTS / milliseconds.median
                table.rows.append([chunk_size, name, draws_a_second, times])
        few, many = (
            peak_bytes(partial(estimate, x[:8], n, 100), options.device) for n in (1000, 20_000)
        )
    table.note = (
        f"Peak memory with 8 images and chunks of 100 is {few / 2**20:.2f} MiB at 1,000 draws and "
        f"{many / 2**20:.2f} MiB at 20,000 draws, a ratio of {many / few:.3f}. The first compiled "
        f"calls, which make the graphs, take {', '.join(first_calls)} s. They are not in the table."
    )
    yield table
