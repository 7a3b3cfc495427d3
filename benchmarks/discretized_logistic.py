"""Time and memory of the discretized logistic mixture over those of the usual recipe, in one run.

    python benchmarks/discretized_logistic.py [--device cuda] [--rounds 30] [--threads 1]

Forward plus backward of 10 components over 16 x 3,072 sub-pixels. The baseline is the recipe of
PixelCNN++ as it is usually carried over to PyTorch: pixels on [-1, 1], a threshold, floors, and
a choice between branches by products with masks. The two take turns of a few steps each, of which
the first is not timed: it pays for the caches and the heap that the other one left behind. The
ratio is the median over the rounds. On CUDA the time is also put beside that of moving all inputs
and outputs once.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.profiler import ProfilerActivity, profile

from pyro_ext.distributions import DiscretizedLogisticMixture

NUM_PIXELS, NUM_COMPONENTS = 16 * 3072, 10
STEPS_PER_TURN = 5


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


def make_steps(device: torch.device) -> dict[str, Callable[[], None]]:
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
    }


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes alive at a time beyond the parameters; their gradients count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))


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


def main() -> None:
    """Prints times, memory and their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    steps = make_steps(device)
    durations: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                step()
            durations[name].append((time.perf_counter() - start) / STEPS_PER_TURN)
    (base, base_durations), *_ = durations.items()
    base_peak = peak_bytes(steps[base], device)
    for name, step in steps.items():
        ratios = (t / u for t, u in zip(durations[name], base_durations, strict=True))
        peak = peak_bytes(step, device)
        print(
            f"{name}: {1e3 * statistics.median(durations[name]):.2f} ms, "
            f"{peak / 2**20:.1f} MiB, ratios {statistics.median(ratios):.3f} (time) and "
            f"{peak / base_peak:.3f} (memory)"
        )
        if device.type == "cuda":
            floor = statistics.median(durations[name]) / bandwidth_floor(device)
            print(f"    {floor:.2f} x the time of moving inputs and outputs once")


if __name__ == "__main__":
    main()
