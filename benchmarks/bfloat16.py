"""Autocast to bfloat16: the time of a step of the VAE, and its cost in held-out evidence.

The evidence is that of networks trained on scikit-learn's 8 x 8 digits from the same seeds, and it
is estimated in float32.
"""

import importlib.util
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from benchmarks.harness import Options, Spread, Step, Table, compare
from benchmarks.training_step import pyro_step
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, estimate_evidence

SIZES = {"cpu": ((20, 5), (20, 50), (100, 50)), "cuda": ((20, 50), (100, 50), (1024, 50))}
DTYPES = "float32", "bfloat16"
NUM_TRAINING, BATCH_SIZE, K = 1500, 100, 5


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """The context of a step, which must be entered anew for each."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def under_autocast(dtype: str, step: Step, device: torch.device) -> Step:
    """A step in a dtype."""

    def cast() -> float:
        with autocast(dtype, device):
            return step()

    return cast


def times(options: Options) -> Table:
    """Steps in both dtypes, over the compiled step in float32."""
    ratio = "ratio to CompiledSVI, float32"
    columns = ["batch", "K", "step", "dtype", "ms", ratio]
    table = Table("Autocast to bfloat16", columns, chart=(columns[:4], ratio))
    for batch_size, K in SIZES[options.device.type]:
        images = random_images(batch_size, options.device)
        pyro.clear_param_store()
        steps = {}
        for cls in (CompiledSVI, SVI):
            for dtype in DTYPES:
                elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
                with autocast(dtype, options.device):
                    step = pyro_step(cls, elbo, images, f"{cls.__name__}-{dtype}")
                steps[cls.__name__, dtype] = under_autocast(dtype, step, options.device)
        found = compare({" ".join(key): step for key, step in steps.items()}, options)
        for key, row in zip(steps, found.values(), strict=True):
            table.rows.append([batch_size, K, *key, *row])
    table.note = instructions(options.device)
    return table


def instructions(device: torch.device) -> str:
    """What the device has for products of bfloat16."""
    if device.type == "cuda":
        return f"Bfloat16 in hardware: {torch.cuda.is_bf16_supported(including_emulation=False)}."
    flags = ""
    if sys.platform == "linux":
        flags = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    found = [name for name in ("avx512_bf16", "amx_bf16") if name in flags]
    return f"Instructions of this CPU for bfloat16: {', '.join(found) or 'none that lscpu names'}."


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Intensities of training images, and binary held-out images."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    images = torch.as_tensor(load_digits().data / 16, dtype=torch.float32)
    images = images[torch.randperm(len(images), generator=generator)]
    held_out = torch.bernoulli(images[NUM_TRAINING:], generator=generator)
    return images[:NUM_TRAINING].to(device), held_out.to(device)


def held_out_evidence(dtype: str, seed: int, num_steps: int, device: torch.device) -> Tensor:
    """The log evidence of each held-out image after training in a dtype."""
    training, held_out = digits(device)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    vae = VAE("vae", num_pixels=training.shape[1]).to(device)
    elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
    svi = CompiledSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        rows = torch.randint(NUM_TRAINING, (BATCH_SIZE,), generator=generator).to(device)
        batch = torch.bernoulli(training[rows])
        with autocast(dtype, device):
            svi.step(batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Pareto k")
        pyro.set_rng_seed(0)
        found = estimate_evidence(
            vae.model, vae.guide, held_out, num_samples=2000, max_plate_nesting=1
        )
    return found.log_evidence


def mean_and_error(values: Tensor) -> str:
    """A mean, and its standard error."""
    return f"{values.mean():.2f} +- {values.std() / math.sqrt(len(values)):.2f}"


def costs(options: Options) -> Table:
    """Held-out evidence in nats an image, and its differences."""
    num_seeds, num_steps = (2, 1500) if options.quick else (4, 4000)
    difference = "bfloat16 - float32"
    table = Table(
        "Held-out evidence after training under autocast",
        ["seed", *DTYPES, difference],
        chart=(["seed"], difference),
    )
    means = []
    for seed in range(num_seeds):
        found = {d: held_out_evidence(d, seed, num_steps, options.device) for d in DTYPES}
        gain = found["bfloat16"] - found["float32"]
        error = float(gain.std() / math.sqrt(len(gain)))
        mean = float(gain.mean())
        row = [mean_and_error(found[dtype]) for dtype in DTYPES]
        table.rows.append([seed, *row, Spread(mean, mean - error, mean + error)])
        means.append(mean)
    table.note = (
        f"Nats an image, with standard errors over {len(gain)} images; that of the difference is "
        f"over its values by image. {num_steps} steps with batch {BATCH_SIZE} and K = {K}. The "
        f"mean difference over seeds is {mean_and_error(torch.tensor(means))} nats."
    )
    return table


def tables(options: Options) -> Iterator[Table]:
    """Times, and the cost where the data are."""
    has_data = importlib.util.find_spec("sklearn") is not None
    table = times(options)
    if not has_data:
        table.note += " The cost in evidence is left out: scikit-learn is not installed."
    yield table
    if has_data:
        yield costs(options)
