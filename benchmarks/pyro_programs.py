"""Time of a compiled step over that of ``SVI``, on programs of the shapes of Pyro's examples.

The programs are those of ``tests/pyro_programs``. ``CompiledSVI`` and ``SVI`` take their steps in
turns. The last columns give the cost of a graph, and the number of steps that repay it.
"""

import math
import warnings
from collections.abc import Iterator
from functools import partial
from statistics import median

import pyro
from pyro import poutine
from pyro.infer import SVI

from benchmarks.harness import Options, Table, compare
from pyro_ext.infer import CompiledSVI
from tests.pyro_programs import PROGRAMS

_QUICK = ("hmm_3", "gaussian_mixture_enumerated", "lda", "vae", "eight_schools_noncentered")
_SMALL = 10.0  # ms a step


def tables(options: Options) -> Iterator[Table]:
    """The ratio for each program, and the medians over the programs."""
    ratio = "ratio to SVI"
    columns = [
        "program",
        "sites",
        "SVI, ms",
        ratio,
        "kernels",
        "capture, s",
        "compile, s",
        "steps that repay",
    ]
    table = Table("Pyro's programs", columns, chart=(columns[:1], ratio))
    names = [name for name in PROGRAMS if name in _QUICK or not options.quick]
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = _measure(name, options)
        if row is not None:
            table.rows.append(row)
    table.note = f"{len(names) - len(table.rows)} programs take eager steps."
    yield table
    small = [row for row in table.rows if row[2].median < _SMALL]
    yield Table(
        "Medians over Pyro's programs",
        ["steps of SVI", "programs", ratio, "capture, s per site", "steps that repay"],
        [
            [
                which,
                len(rows),
                median(row[3].median for row in rows),
                median(row[5] / row[1] for row in rows),
                median(row[7] for row in rows),
            ]
            for which, rows in (("below 10 ms", small), ("all", table.rows))
        ],
        chart=(["steps of SVI"], ratio),
    )


def _measure(name: str, options: Options) -> list | None:
    """A row of the table, or None if the program takes eager steps."""
    program = PROGRAMS[name]
    model, guide, args, kwargs = program.build()
    svis = [
        cls(model, guide, pyro.optim.Adam({"lr": 1e-4}), program.make_elbo())
        for cls in (SVI, CompiledSVI)
    ]
    compiled = svis[1]
    for _ in range(6):  # audits are frequent at first
        compiled.step(*args, **kwargs)
    if not compiled.capture_report().graphs:
        return None
    steps = {type(svi).__name__: partial(svi.step, *args, **kwargs) for svi in svis}
    found = compare(steps, options, seconds=0.5 if options.quick else 2.0)
    (graph,) = compiled.capture_report().graphs
    eager, share = found["SVI"][0], found["CompiledSVI"][1]
    saved = 1e-3 * eager.median * (1 - share.median)
    sites = poutine.trace(model).get_trace(*args, **kwargs).nodes.values()
    return [
        name,
        max(1, sum(site["type"] == "sample" for site in sites)),
        eager,
        share,
        graph.num_kernels,
        graph.capture_seconds,
        graph.compile_seconds,
        round((graph.capture_seconds + graph.compile_seconds) / saved) if saved > 0 else math.inf,
    ]
