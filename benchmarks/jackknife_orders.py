"""The jackknife over all subsets, against the subset-matrix method of the published code.

That method keeps the logarithms of a matrix of subsets times particles, adds them to the log
weights, and takes a logsumexp for each subset.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Options, Step, Table, compare, peak_bytes
from pyro_ext.ops import jackknife, jackknife_coefficients

NUM_POINTS = 256


class SubsetMatrix:
    """The subset-matrix method, with its matrix made beforehand."""

    def __init__(self, num_particles: int, order: int, device: torch.device) -> None:
        rows, weights = [], []
        for j, coefficient in enumerate(jackknife_coefficients(num_particles, order)):
            for removed in itertools.combinations(range(num_particles), j):
                row = torch.full((num_particles,), -math.log(num_particles - j))
                row[list(removed)] = -math.inf
                rows.append(row)
                weights.append(coefficient / math.comb(num_particles, j))
        self.log_matrix = torch.stack(rows, dim=1).unsqueeze(-1).to(device)
        self.weights = torch.tensor(weights, device=device)

    def __call__(self, log_w: Tensor) -> Tensor:
        """The jackknife estimate for log weights of shape (K, B)."""
        return self.weights @ (log_w.unsqueeze(1) + self.log_matrix).logsumexp(0)


def forward_and_backward(function: Callable[[Tensor], Tensor], log_w: Tensor) -> None:
    """The estimate and its gradient."""
    leaf = log_w.clone().requires_grad_()
    function(leaf).sum().backward()


def tables(options: Options) -> Iterator[Table]:
    """Forward and backward, for the orders and numbers of particles that fit."""
    ratio = "ratio to the subset matrix"
    columns = ["order", "K", "method", "ms", ratio, "peak MiB"]
    table = Table("Jackknife over subsets", columns, chart=(columns[:3], ratio))
    for order, K in ((1, 48), (2, 16), (2, 48), *(() if options.quick else ((3, 16),))):
        log_w = torch.randn(K, NUM_POINTS, device=options.device)
        functions = {
            "subset matrix": SubsetMatrix(K, order, options.device),
            "pyro_ext.ops.jackknife": partial(jackknife, order=order),
        }
        steps: dict[str, Step] = {
            name: partial(forward_and_backward, function, log_w)
            for name, function in functions.items()
        }
        for name, found in compare(steps, options).items():
            peak = peak_bytes(steps[name], options.device) / 2**20
            table.rows.append([order, K, name, *found, peak])
    table.note = (
        f"Each time covers forward and backward passes over {NUM_POINTS} data points in float32."
    )
    yield table
