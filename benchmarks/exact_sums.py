"""Time of steps that sum out discrete sites of the model.

The first table compares one particle with Pyro's ``TraceEnum_ELBO``, and compiled with eager steps.
The second one has the growth with the number of particles.
"""

import warnings
from collections.abc import Iterator

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO

from benchmarks.harness import Options, Table, compare
from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from tests.tracing import enumerated

_MODELS = ("mixture", "dependent", "markov_chain", "factorial", "many_chains")


def tables(options: Options) -> Iterator[Table]:
    """The ratio for each model, and the times for several numbers of particles."""
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _one_particle(options)
            yield _growth(options)
    finally:
        torch.set_default_dtype(torch.float32)


def _one_particle(options: Options) -> Table:
    columns = ["model", "step", "ms", "ratio to TraceEnum_ELBO"]
    table = Table("Exact sums, one particle", columns, chart=(columns[:2], columns[3]))
    for name in _MODELS:
        model = getattr(enumerated, name)
        pyro.clear_param_store()
        elbo = ImportanceWeightedELBO(1, max_plate_nesting=1)
        steps = {
            "TraceEnum_ELBO": _step(SVI, model, TraceEnum_ELBO(max_plate_nesting=1)),
            "ImportanceWeightedELBO(1)": _step(SVI, model, elbo),
            "ImportanceWeightedELBO(1), compiled": _step(CompiledSVI, model, elbo),
        }
        found = compare(steps, options, options.seconds / 4)
        table.rows += [[name, step, *spread] for step, spread in found.items()]
    return table


def _growth(options: Options) -> Table:
    columns = ["K", "ms", "ratio to K = 50"]
    table = Table("Exact sums, growth with K", columns, chart=(columns[:1], columns[2]))
    table.note = "A hidden Markov model with 5 times, compiled."
    pyro.clear_param_store()
    numbers = (50, 500, 5000, 50_000)
    steps = {
        str(K): _step(
            CompiledSVI, enumerated.markov_chain, ImportanceWeightedELBO(K, max_plate_nesting=1)
        )
        for K in numbers
    }
    table.rows = [[int(K), *spread] for K, spread in compare(steps, options).items()]
    return table


def _step(cls: type, model: object, elbo: object) -> object:
    svi = cls(model, enumerated.guide_of_means, pyro.optim.Adam({}), elbo)
    for _ in range(6):  # audits are frequent at first
        svi.step(enumerated.X)
    return lambda: svi.step(enumerated.X)
