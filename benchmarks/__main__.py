"""Runs the benchmarks, prints tables, and saves them with their plots.

python -m benchmarks --quick
python -m benchmarks --only training_step evidence --device cuda --output results
"""

import argparse
import json
import platform
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pyro
import torch
from tqdm import tqdm

from benchmarks.harness import Options, Table

SUITES = (
    "training_step",
    "step_budget",
    "bounds",
    "eager_step",
    "pyro_programs",
    "exact_sums",
    "jackknife_orders",
    "discretized_logistic",
    "bayes_by_backprop",
    "evidence",
    "chunk_memory",
    "growth",
    "long_run",
    "several_processes",
    "signal_to_noise",
)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "pyro-ppl"))
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter turns")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, help="which suites")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args()
    options = Options(torch.device(arguments.device), arguments.quick)
    # Saturating units make denormal numbers, which slow a CPU's matrix products.
    torch.set_flush_denormal(True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(machine(options.device), end="\n\n")
    tables: list[Table] = []
    for suite in tqdm(arguments.only, disable=arguments.no_progress, unit="suite"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        for table in import_module(f"benchmarks.{suite}").tables(options):
            tqdm.write(table.markdown())
            tables.append(table)
            table.draw(arguments.output)
            results = {
                "machine": machine(options.device),
                "quick": options.quick,
                "tables": [table.record() for table in tables],
            }
            (arguments.output / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
