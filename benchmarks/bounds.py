"""Every bound under every gradient rule, compiled and eager."""

from collections.abc import Iterator
from typing import Any

import pyro
from pyro.infer import SVI

from benchmarks.harness import Options, Step, Table, compare, peak_bytes
from benchmarks.training_step import pyro_step
from benchmarks.vae import random_images
from pyro_ext.infer import (
    CombinedELBO,
    CompiledSVI,
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultiplyImportanceWeightedELBO,
    PartiallyImportanceWeightedELBO,
    ThermodynamicELBO,
    VariationalRenyiELBO,
)

BATCH_SIZE, K = 20, 50
PUBLISHED = "jackknife", "published"  # trains model and guide on the jackknife
BOUNDS: dict[str, Any] = {
    "importance-weighted": ImportanceWeightedELBO,
    "jackknife, order 1": lambda K, **options: JackknifeELBO(K, 1, *PUBLISHED, **options),
    "jackknife, order 2": lambda K, **options: JackknifeELBO(K, 2, *PUBLISHED, **options),
    "variational Renyi": lambda K, **options: VariationalRenyiELBO(0.5, K, **options),
    "combined": lambda K, **options: CombinedELBO(0.5, K, **options),
    "multiply importance-weighted": lambda K, **options: MultiplyImportanceWeightedELBO(
        K, num_groups=5, **options
    ),
    "partially importance-weighted": lambda K, **options: PartiallyImportanceWeightedELBO(
        K, num_groups=5, **options
    ),
    "thermodynamic": lambda K, **options: ThermodynamicELBO(K, 5, **options),
}


def tables(options: Options) -> Iterator[Table]:
    """Times over that of the compiled importance-weighted step."""
    ratio = "ratio to the compiled importance-weighted step"
    columns = ["bound", "gradient", "step", "ms", ratio, "peak MiB"]
    table = Table("Bounds and gradient rules", columns, chart=(columns[:3], ratio))
    images = random_images(BATCH_SIZE, options.device)
    names = list(BOUNDS)[:3] if options.quick else list(BOUNDS)
    rules = ("pathwise", "dreg") if options.quick else ("pathwise", "dreg", "stl")
    pyro.clear_param_store()
    steps: dict[tuple[str, str, str], Step] = {}
    for cls in (CompiledSVI, SVI):
        for name in names:
            for rule in rules:
                objective = BOUNDS[name](K, gradient=rule, max_plate_nesting=1)
                key = name, rule, cls.__name__
                steps[key] = pyro_step(cls, objective, images, "-".join(key))
    found = compare({" ".join(key): step for key, step in steps.items()}, options, 30.0)
    for (key, step), (milliseconds, times) in zip(steps.items(), found.values(), strict=True):
        peak = peak_bytes(step, options.device) / 2**20
        table.rows.append([*key, milliseconds, times, peak])
    table.note = f"All rows use batch {BATCH_SIZE} and K = {K}."
    yield table
