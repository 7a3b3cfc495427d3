"""The scale mixture over the weights of a network, over the time of moving its bytes once."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.bayes_by_backprop import PROBS, SCALES
from benchmarks.harness import Options, Step, Table, compare
from pyro_ext.distributions import NormalScaleMixture

#: The network of the Bayes-by-Backprop benchmark, and enough weights to fill a GPU.
NUM_WEIGHTS = {"cpu": (478_410,), "cuda": (478_410, 50_000_000)}


def gradient(log_prob: Callable[[Tensor], Tensor], weights: Tensor, slopes: Tensor) -> Step:
    """Forward and backward."""
    weights = weights.clone().requires_grad_()
    return lambda: torch.autograd.grad(log_prob(weights), weights, slopes)


def usual_recipe(weights: Tensor) -> Tensor:
    """The log density, as one writes it."""
    normals = [torch.distributions.Normal(0.0, scale, validate_args=False) for scale in SCALES]
    terms = [n.log_prob(weights) + math.log(p) for n, p in zip(normals, PROBS, strict=True)]
    return torch.logaddexp(*terms)


def tables(options: Options) -> Iterator[Table]:
    """Forward and backward, with a given gradient of the result."""
    ratio = "ratio to moving the bytes once"
    table = Table("Scale mixture", ["weights", "by", "ms", ratio], chart=(["weights", "by"], ratio))
    scales, probs = (torch.tensor(values, device=options.device) for values in (SCALES, PROBS))
    mixture = NormalScaleMixture(scales, probs=probs, validate_args=False)
    for number in NUM_WEIGHTS[options.device.type]:
        weights = torch.randn(number, device=options.device) / 10
        slopes = torch.ones_like(weights)
        # Weights and slopes come in, and log densities and gradients go out.
        source, target = (torch.ones(2 * number, device=options.device) for _ in range(2))
        steps = {
            "moving the bytes": lambda target=target, source=source: target.copy_(source),
            "usual recipe": gradient(usual_recipe, weights, slopes),
            "NormalScaleMixture": gradient(mixture.log_prob, weights, slopes),
        }
        table.rows += [[number, name, *times] for name, times in compare(steps, options).items()]
    yield table
