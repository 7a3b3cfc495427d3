"""Where the time of a small ``CompiledSVI.step`` goes, by part.

A part is timed by a clock around the calls that belong to it. The clock itself costs about 0.1 us a
call. "other bookkeeping" is the rest of the step.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import torch
from torch import Tensor

from benchmarks.harness import Options, Step, Table, compare
from benchmarks.plain_steps import matmuls
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.capture.compiled_step import CompiledStep
from pyro_ext.infer.svi.capture.graphs import Graphs
from pyro_ext.infer.svi.capture.reachable_state import ReachableState
from pyro_ext.infer.svi.joint_optimizer import JointOptimizer

#: A part of a step, and the method that does it. A part excludes the parts inside of it.
PARTS: list[tuple[str, Any, str]] = [
    ("graph", CompiledStep, "__call__"),
    ("guards: plain values", ReachableState, "changed"),
    ("guards: parameters", CompiledStep, "params"),
    ("inputs", CompiledStep, "inputs"),
    ("guards: key of the arguments", Graphs, "find"),
    ("fused Adam", torch.optim.Adam, "step"),
    ("settings of the optimiser", JointOptimizer, "step"),
    ("gradients to .grad", CompiledSVI, "_finish"),
    ("other bookkeeping", CompiledSVI, "step"),
]


class Clock:
    """The seconds in each part of a step, without those in the parts inside of it."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((name for name, *_ in PARTS), 0.0)
        self._inside = [0.0]

    def around(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, with a clock around it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] += elapsed - self._inside.pop()
                self._inside[-1] += elapsed

        return call


def medians(step: Step, num_steps: int) -> dict[str, float]:
    """The median microseconds of each part over steps."""
    rows = []
    for _ in range(num_steps):
        clock = Clock()
        patches = [patch.object(x, m, clock.around(n, getattr(x, m))) for n, x, m in PARTS]
        for each in patches:
            each.start()
        step()
        for each in patches:
            each.stop()
        rows.append([1e6 * x for x in clock.seconds.values()])
    return dict(zip(clock.seconds, np.median(rows, axis=0).tolist(), strict=True))


def tables(options: Options) -> Iterator[Table]:
    """A budget for each of two small sizes."""
    columns = ["batch", "K", "part", "microseconds"]
    table = Table("Budget of a compiled step", columns, chart=(columns[:3], columns[3]))
    for batch_size, K in ((20, 1), (20, 5)):
        pyro.clear_param_store()
        images: Tensor = random_images(batch_size, options.device)
        vae = VAE("budget").to(options.device)
        elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
        svi = CompiledSVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        step = lambda svi=svi, images=images: svi.step(images)  # noqa: E731
        for _ in range(300):
            step()
        found = compare({"matmuls alone": matmuls(images, K), "whole step": step}, options)
        rows = {name: 1e3 * spread.median for name, (spread, _) in found.items()}
        rows |= medians(step, 300 if options.quick else 1000)
        table.rows += [[batch_size, K, name, value] for name, value in rows.items()]
    yield table
