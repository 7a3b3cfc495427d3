"""The discretized logistic mixture, over the usual recipe.

Forward plus backward of 10 components over 16 x 3,072 sub-pixels. The baseline is the recipe of
PixelCNN++ as it is usually carried over to PyTorch: pixels on [-1, 1], a threshold, floors, and
a choice between branches by products with masks. The last row is with `use_fused_kernels`. On CUDA
the time is also put beside that of moving all inputs and outputs once.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.harness import Options, Step, Table, compare, peak_bytes, with_fused_kernels
from pyro_ext.distributions import DiscretizedLogisticMixture

NUM_PIXELS, NUM_COMPONENTS = 16 * 3072, 10


def usual_recipe(pixels: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """The log-likelihood of pixels on [-1, 1] in 255 steps."""
    pixels = pixels.unsqueeze(-1) + torch.zeros_like(means)
    log_scales = log_scales.clamp(min=-7.0)
    centered = pixels - means
    inverse = torch.exp(-log_scales)
    above, below = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
    mass = torch.sigmoid(above) - torch.sigmoid(below)
    middle = inverse * centered
    density = middle - log_scales - 2 * softplus(middle) - math.log(127.5)
    is_large, is_high, is_low = (
        (mass > 1e-5).float(),
        (pixels > 0.999).float(),
        (pixels < -0.999).float(),
    )
    inner = is_large * mass.clamp(min=1e-12).log() + (1 - is_large) * density
    inner = is_high * -softplus(below) + (1 - is_high) * inner
    log_mass = is_low * (above - softplus(above)) + (1 - is_low) * inner
    largest = logits.max(-1, keepdim=True).values
    log_weights = logits - largest - (logits - largest).exp().sum(-1, keepdim=True).log()
    joint = log_mass + log_weights
    largest, kept = joint.max(-1).values, joint.max(-1, keepdim=True).values
    return largest + (joint - kept).exp().sum(-1).log()


def make_steps(device: torch.device) -> dict[str, Step]:
    """Forward and backward of each, by name, with the same image and parameters."""
    torch.manual_seed(0)
    shape = (NUM_PIXELS, NUM_COMPONENTS)
    pixels = torch.randint(0, 256, (NUM_PIXELS,), device=device).float()
    logits, loc, log_scale = (torch.randn(shape, device=device) for _ in range(3))
    loc, log_scale = 127.5 + 60 * loc, 2.5 + log_scale / 2
    rescaled = pixels / 127.5 - 1

    def ours(logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        mixture = DiscretizedLogisticMixture(logits, loc, log_scale=log_scale, validate_args=False)
        return mixture.log_prob(pixels)

    def usual(logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
        return usual_recipe(rescaled, logits, loc, log_scale)

    def step(function: Callable[..., Tensor], *parameters: Tensor) -> None:
        leaves = [p.detach().requires_grad_() for p in parameters]
        function(*leaves).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    scaled = (logits, (loc - 127.5) / 127.5, log_scale - math.log(127.5))
    return {
        "usual recipe": lambda: step(usual, *scaled),
        "DiscretizedLogisticMixture": lambda: step(ours, logits, loc, log_scale),
        "the same with a fused kernel": with_fused_kernels(
            lambda: step(ours, logits, loc, log_scale)
        ),
    }


def bandwidth_floor(device: torch.device) -> float:
    """Seconds to read the pixels and parameters and to write log p and the gradients."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    durations = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    num_values = NUM_PIXELS * (6 * NUM_COMPONENTS + 2)
    return statistics.median(durations) * num_values / (2 * source.numel())


def tables(options: Options) -> Iterator[Table]:
    """Time and memory on one core and on all."""
    columns = ["cores", "log-likelihood", "ms", "ratio to the usual recipe", "peak MiB"]
    table = Table(
        "Discretized logistic mixture",
        columns,
        chart=(columns[:2], "ratio to the usual recipe"),
    )
    num_threads = torch.get_num_threads()
    for cores in sorted({1, num_threads}) if options.device.type == "cpu" else [num_threads]:
        torch.set_num_threads(cores)
        steps = make_steps(options.device)
        found = compare(steps, options)
        for name, (milliseconds, ratio) in found.items():
            peak = peak_bytes(steps[name], options.device) / 2**20
            table.rows.append([cores, name, milliseconds, ratio, peak])
        if options.device.type == "cuda":
            floor = 1e3 * bandwidth_floor(options.device)
            own = found["DiscretizedLogisticMixture"][0].median
            table.note = f"{own / floor:.2f} x the time of moving inputs and outputs once."
    torch.set_num_threads(num_threads)
    yield table
