"""The sites of a trace that add to the density, and the plates around them."""

from typing import Any, NamedTuple

from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.sites import PARTICLE_PLATE, is_masked_out


class Plate(NamedTuple):
    """A plate that encloses a site; unlike Pyro's own frames, quick to hash."""

    name: str
    dim: int | None
    size: int
    full_size: int
    counter: int

    @property
    def is_vectorized(self) -> bool:
        """Whether the plate has a dim, rather than being iterated over."""
        return self.dim is not None

    @property
    def subsampling_scale(self) -> float:
        """Full size over the size of the subsample."""
        return self.full_size / self.size


class DensitySite(NamedTuple):
    """A sample site that adds to the density, and the plates around it but the particle plate."""

    program: str
    name: str
    node: Any
    plates: frozenset[Plate]

    @property
    def key(self) -> tuple[str, str]:
        """Program and name."""
        return self.program, self.name

    @property
    def is_observed(self) -> bool:
        """Whether its value is data, or it is a factor."""
        return self.node["is_observed"]

    @property
    def log_prob(self) -> Tensor:
        """Its scaled and masked log-probability."""
        return self.node["log_prob"]


def density_sites(program: str, trace: Trace) -> list[DensitySite]:
    """The sample sites of a trace that are neither deterministic nor masked out as a whole.

    :param str program: ``"model"`` or ``"guide"``.
    """
    return [
        DensitySite(program, name, node, plates_of(node))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not is_masked_out(node)
    ]


def plates_of(node: Any) -> frozenset[Plate]:
    """The plates around a site but the particle plate."""
    return frozenset(
        Plate(f.name, f.dim, f.size, f.full_size or f.size, f.counter)
        for f in node["cond_indep_stack"]
        if f.name != PARTICLE_PLATE
    )
