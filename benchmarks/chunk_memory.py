"""Peak memory of a step with K = 2,000 in chunks of 50, over that of a step with K = 50."""

from collections.abc import Iterator

import pyro
import torch

from benchmarks.harness import Options, Table, peak_bytes
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import ImportanceWeightedELBO


def step_peak(elbo: ImportanceWeightedELBO, device: torch.device) -> int:
    """The peak in a second step, after one that sets everything up."""
    pyro.clear_param_store()
    vae = VAE("vae").to(device)
    images = random_images(20, device)
    elbo.loss_and_grads(vae.model, vae.guide, images)
    return peak_bytes(lambda: elbo.loss_and_grads(vae.model, vae.guide, images), device)


def tables(options: Options) -> Iterator[Table]:
    """Peaks and their ratios, for two gradient rules."""
    ratio = "ratio to K = 50"
    columns = ["K", "chunks", "gradient", "peak MiB", ratio]
    table = Table("Memory of many particles", columns, chart=(columns[:3], ratio))
    base = step_peak(ImportanceWeightedELBO(50, max_plate_nesting=1), options.device)
    table.rows.append([50, "one", "pathwise", base / 2**20, 1.0])
    for rule in ("pathwise", "dreg"):
        for size in (50, None):
            elbo = ImportanceWeightedELBO(
                2000, gradient=rule, particle_chunk_size=size, max_plate_nesting=1
            )
            peak = step_peak(elbo, options.device)
            chunks = "one" if size is None else f"of {size}"
            table.rows.append([2000, chunks, rule, peak / 2**20, peak / base])
    yield table
