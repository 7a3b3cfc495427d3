"""Interleaved timing, peak memory, the machine, tables and their plots."""

import itertools
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from pyro_ext.ops import use_fused_kernels

Step = Callable[[], Any]


@dataclass(frozen=True)
class Options:
    """What the command line asked for.

    :param torch.device device: where to run.
    :param bool quick: fewer settings and rounds.
    :param float seconds: about how long to time one group of steps.
    """

    device: torch.device
    quick: bool
    seconds: float = 3.0


@dataclass(frozen=True)
class Spread:
    """A median with quartiles."""

    median: float
    lower: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        lower, median, upper = np.quantile(np.asarray(values), [0.25, 0.5, 0.75])
        return Spread(float(median), float(lower), float(upper))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.lower:.3g} to {self.upper:.3g})"


@dataclass
class Table:
    """One result: rows of cells under columns, and what to draw of it.

    :param str title: what was measured.
    :param columns: the headings.
    :param rows: numbers, words or spreads.
    :param str note: a line below.
    :param chart: the columns that name a bar, and the column of its length.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""
    chart: tuple[Sequence[str], str] = ((), "")

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"### {self.title}", "", f"| {' | '.join(self.columns)} |"]
        lines.append("|" + "---|" * len(self.columns))
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in self.rows]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])

    def record(self) -> dict[str, Any]:
        """The table for a JSON file."""
        rows = [dict(zip(self.columns, map(_plain, row), strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "note": self.note}

    @property
    def file_name(self) -> str:
        """The title as the name of a figure's file."""
        return "_".join(re.findall("[a-z0-9]+", self.title.lower())) + ".png"

    def draw(self, folder: Path) -> None:
        """Saves a bar chart."""
        from matplotlib.figure import Figure

        labels, value = self.chart
        names = [
            ", ".join(_cell(row[self.columns.index(label)]) for label in labels)
            for row in self.rows
        ]
        spreads = [row[self.columns.index(value)] for row in self.rows]
        spreads = [s if isinstance(s, Spread) else Spread(s, s, s) for s in spreads]
        errors = [[s.median - s.lower for s in spreads], [s.upper - s.median for s in spreads]]
        figure = Figure(figsize=(8, 1.5 + 0.2 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), [s.median for s in spreads], xerr=errors, color="#3b6ea8")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.margins(y=0.01)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(value)
        axes.set_title(f"{self.title} ({', '.join(labels)})")
        figure.savefig(folder / self.file_name, dpi=120)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, Spread) else value


def compare(
    steps: dict[str, Step], options: Options, seconds: float | None = None
) -> dict[str, tuple[Spread, Spread]]:
    """Milliseconds of each step, and the ratio to the first one's in the same round.

    The steps take turns in a random order, for the time of a step depends on what ran before.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    for step in steps.values():
        warm_up(step, options.seconds / 3)
    durations: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + (seconds or options.seconds)
    while time.perf_counter() < end or len(next(iter(durations.values()))) < 5:
        for name in random.sample(list(timers), len(timers)):
            durations[name].append(1e3 * timers[name].timeit(1).mean)
    base = next(iter(durations.values()))
    return {
        name: (Spread.of(values), Spread.of([t / u for t, u in zip(values, base, strict=True)]))
        for name, values in durations.items()
    }


def warm_up(step: Step, seconds: float, most: int = 20) -> None:
    """Calls a step for a time. The first steps of a graph have most of its audits."""
    end = time.perf_counter() + seconds
    for _ in range(most):
        step()
        if time.perf_counter() > end:
            break


def with_fused_kernels(step: Step) -> Step:
    """The step with fused kernels."""

    def fused() -> None:
        use_fused_kernels()
        step()
        use_fused_kernels(False)

    return fused


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most bytes that a step has alive at a time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Pyro {pyro.__version__}"
    )


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return float(np.exp(np.mean(np.log(values))))
