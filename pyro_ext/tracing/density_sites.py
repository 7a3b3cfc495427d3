"""The sites of a trace that contribute to the density, and the plates around them."""

from typing import Any, NamedTuple

from pyro.poutine import Trace
from torch import Tensor

from pyro_ext.tracing.sites import PARTICLE_PLATE, is_masked_out


class Plate(NamedTuple):
    """A plate that encloses a site.

    Unlike Pyro's own frames, it is fast to hash.
    """

    name: str
    dim: int | None
    size: int
    full_size: int
    counter: int

    @property
    def is_vectorized(self) -> bool:
        """Whether the plate has a dim; a sequential plate has none."""
        return self.dim is not None

    @property
    def subsampling_scale(self) -> float:
        """The full size divided by the size of the subsample."""
        return self.full_size / self.size


class DensitySite(NamedTuple):
    """A sample site that contributes to the density, or a sum over enumerated values.

    :ivar program: ``"model"`` or ``"guide"``.
    :ivar name: the name of the site. A sum has the name of the first enumerated site.
    :ivar node: the node of the trace, or the node that stands for a sum.
    :ivar plates: its plates, without the particle plate.
    :ivar members: the sites of a sum.
    """

    program: str
    name: str
    node: Any
    plates: frozenset[Plate]
    members: tuple[Any, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """The program (``"model"`` or ``"guide"``) and the name."""
        return self.program, self.name

    @property
    def is_observed(self) -> bool:
        """Whether the site is observed or a factor."""
        return self.node["is_observed"]

    @property
    def log_prob(self) -> Tensor:
        """The log-probability, scaled and masked."""
        return self.node["log_prob"]


def density_sites(program: str, trace: Trace) -> list[DensitySite]:
    """Return the sample sites of a trace that contribute to its density.

    Deterministic sites and entirely masked sites do not contribute.

    :param program: ``"model"`` or ``"guide"``.
    :param trace: the trace.
    """
    return [
        DensitySite(program, name, node, plates_of(node))
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not is_masked_out(node)
    ]


def plates_of(node: Any) -> frozenset[Plate]:
    """Return the plates around a site, without the particle plate."""
    return frozenset(
        Plate(f.name, f.dim, int(f.size), int(f.full_size or f.size), f.counter)
        for f in node["cond_indep_stack"]
        if f.name != PARTICLE_PLATE
    )
