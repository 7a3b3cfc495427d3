"""Runs the parts in the order of their importance, within a given time."""

import gc
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyro
import torch

from benchmarks import bfloat16, counts, discretized_logistic, evidence
from benchmarks.gpu import scale_mixture, steps
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.cuda_tests import run_tests
from benchmarks.gpu.report import Report
from benchmarks.harness import Options, Table

Pieces = Iterator[Table | str]


class Part(NamedTuple):
    """A part of the run.

    :param title: its heading in the file.
    :param until: the fraction of the time at whose end it must be done.
    :param needs: about how many seconds it takes at least.
    :param run: yields tables and paragraphs. A table may be yielded again when it has grown.
    """

    title: str
    until: float
    needs: float
    run: Callable[[Options, Clock], Pieces]


def suite(tables: Callable[[Options], Iterator[Table]]) -> Callable[[Options, Clock], Pieces]:
    """A suite of the benchmarks as a part."""
    return lambda options, clock: tables(options)


PARTS = (
    Part("Tests on the device", 0.45, 30.0, run_tests),
    Part("Training step", 0.75, 15.0, steps.training_steps),
    Part("Other objectives, compiled", 0.8, 12.0, steps.other_objectives),
    Part("Discretized logistic mixture", 0.85, 8.0, suite(discretized_logistic.tables)),
    Part("Scale mixture", 0.87, 4.0, suite(scale_mixture.tables)),
    Part("Bfloat16", 0.95, 25.0, suite(bfloat16.tables)),
    Part("Counts", 0.98, 15.0, suite(counts.tables)),
    Part("Evidence", 1.0, 12.0, suite(evidence.tables)),
)


def run(
    parts: Sequence[Part], device: torch.device, is_rehearsal: bool, seconds: float, folder: Path
) -> Path:
    """Runs the parts for which there is time, and returns the path of their file."""
    start = time.perf_counter()
    torch.set_float32_matmul_precision("highest")
    options = Options(device, quick=True, seconds=0.1 if is_rehearsal else 1.5)
    report = Report(folder, device, shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]))
    for part in parts:
        clock = Clock(start + part.until * seconds, is_rehearsal)
        if clock.left < part.needs:
            report.add(
                part.title,
                f"Left out: it needs about {part.needs:.0f} s of the {seconds:.0f} s, and "
                f"{max(clock.left, 0):.0f} s were left.",
            )
            continue
        clear(device)
        try:
            for piece in part.run(options, clock):
                report.add(part.title, piece)
        except Exception as error:  # the other parts are still worth their time
            traceback.print_exc()
            report.add(part.title, f"Stopped by an error. {described(error)}")
        report.add(part.title, f"This part took {clock.passed:.0f} s.")
        print(f"{part.title}: {clock.passed:.0f} s", flush=True)
    print(report.path.read_text())
    return report.path


def described(error: Exception) -> str:
    """The kind of an error, and the first line of its message."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"


def clear(device: torch.device) -> None:
    """Frees what an earlier part holds, and seeds the next."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
