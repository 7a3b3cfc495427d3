"""Small model and guide pairs with the shapes of Pyro's examples, tutorials and contrib."""

from tests.pyro_programs import (  # noqa: F401
    autoguides,
    discrete,
    flows,
    hierarchical,
    hmm,
    mixtures,
    networks,
    plates,
    processes,
    sequences,
    time_series,
    vae,
)
from tests.pyro_programs.program import PROGRAMS, Pair, Program

__all__ = ["PROGRAMS", "Pair", "Program"]
