"""How the compiled step grows with particles, batch and latent dims: fitted exponents."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyro

from benchmarks.harness import Options, Table, compare, peak_bytes
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO

BASE = {"K": 20, "batch": 100, "latent dims": 50}
SIZES = {"K": (5, 20, 80), "batch": (25, 100, 400), "latent dims": (50, 200, 800)}


def measure(setting: dict[str, int], options: Options) -> tuple[float, float]:
    """Milliseconds and peak MiB of a step."""
    pyro.clear_param_store()
    vae = VAE("vae", latent=setting["latent dims"]).to(options.device)
    images = random_images(setting["batch"], options.device)
    elbo = ImportanceWeightedELBO(setting["K"], max_plate_nesting=1)
    svi = CompiledSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)

    def step() -> float:
        return svi.step(images)

    step()
    milliseconds, _ = compare({"step": step}, options, options.seconds / 3)["step"]
    return milliseconds.median, peak_bytes(step, options.device) / 2**20


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The least-squares slope of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def tables(options: Options) -> Iterator[Table]:
    """Times and peaks along each size, and their exponents."""
    columns = ["size", "values", "ms", "exponent of time", "peak MiB", "exponent of memory"]
    table = Table("Growth of the compiled step", columns, chart=(columns[:2], columns[3]))
    for name, sizes in SIZES.items():
        sizes = sizes[:2] if options.quick else sizes
        found = [measure({**BASE, name: size}, options) for size in sizes]
        times, peaks = zip(*found, strict=True)
        row = [name, ", ".join(map(str, sizes))]
        for values in (times, peaks):
            row += [", ".join(f"{value:.3g}" for value in values), exponent(sizes, values)]
        table.rows.append(row)
    table.note = ", ".join(f"{name} = {size}" for name, size in BASE.items()) + " otherwise."
    yield table
