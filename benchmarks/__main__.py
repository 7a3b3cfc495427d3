"""Runs the benchmarks, prints tables, and saves them with their plots.

python -m benchmarks --quick
python -m benchmarks --only training_step evidence --device cuda --output results
python -m benchmarks --gpu --minutes 8
"""

import argparse
import json
from importlib import import_module
from pathlib import Path

import pyro
import torch
from tqdm import tqdm

from benchmarks.harness import Options, Table, machine

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
    "counts",
    "bfloat16",
    "evidence",
    "evidence_estimators",
    "annealing",
    "chunk_memory",
    "growth",
    "long_run",
    "several_processes",
    "signal_to_noise",
    "chi_upper",
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter turns")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, help="which suites")
    parser.add_argument("--gpu", action="store_true", help="measure a GPU, see benchmarks/gpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="the time of --gpu")
    parser.add_argument("--device", help="by default cpu, or cuda with --gpu")
    parser.add_argument("--output", type=Path, help="the folder of the results")
    parser.add_argument("--no-progress", action="store_true")
    arguments = parser.parse_args()
    # Saturating units make denormal numbers, which slow a CPU's matrix products.
    torch.set_flush_denormal(True)
    if arguments.gpu:
        measure_gpu(arguments)
    else:
        run_suites(arguments)


def measure_gpu(arguments: argparse.Namespace) -> None:
    """Writes ``RESULTS-GPU.md``."""
    device = torch.device(arguments.device or "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "--gpu needs a CUDA device, and torch finds none. To rehearse it on a CPU, add "
            "--device cpu --quick."
        )
    kit = import_module("benchmarks.gpu.kit")
    folder = arguments.output or Path(__file__).parent
    kit.run(kit.PARTS, device, arguments.quick, 60 * arguments.minutes, folder)


def run_suites(arguments: argparse.Namespace) -> None:
    """Runs the suites, and writes ``results.json`` and figures."""
    device = torch.device(arguments.device or "cpu")
    options = Options(device, arguments.quick, 3.0 if arguments.quick else 12.0)
    output = arguments.output or Path("benchmark_results")
    output.mkdir(parents=True, exist_ok=True)
    print(machine(options.device), end="\n\n")
    tables: list[Table] = []
    for suite in tqdm(arguments.only, disable=arguments.no_progress, unit="suite"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        for table in import_module(f"benchmarks.{suite}").tables(options):
            tqdm.write(table.markdown())
            tables.append(table)
            table.draw(output)
            results = {
                "machine": machine(options.device),
                "quick": options.quick,
                "tables": [table.record() for table in tables],
            }
            (output / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
