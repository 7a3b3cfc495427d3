"""Log-probabilities of sites, summed to an entry for each particle and element of common plates."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_ext.tracing.density_sites import Plate


class OuterTerm(NamedTuple):
    """A term of the objective that is the same for all particles, and the plates around it."""

    value: Tensor
    plates: frozenset[Plate]
    is_leaf: bool = False

    def sum_to(self, plates: frozenset[Plate]) -> Tensor:
        """Return the value summed over all of its plates except ``plates``."""
        dims = [p.dim for p in self.plates - plates if p.dim and -p.dim <= self.value.dim()]
        return self.value.sum(dims, keepdim=True) if dims else self.value


class Layout(NamedTuple):
    """The shape ``(K, *common)``, to which log-probabilities of sites are summed."""

    num_particles: int
    particle_dim: int | None
    shape: torch.Size
    kept: set[int | None]
    like: Tensor

    def stack(self, terms: Iterable[Sequence[Tensor]]) -> Float[Tensor, "K *common"]:
        """Add up the terms of each trace, and stack the traces unless they are vectorised."""
        rows = [self._row(row_terms) for row_terms in terms]
        if self.particle_dim is not None:
            return rows[0].expand(self.num_particles, *self.shape)
        return torch.stack([row.expand(self.shape) for row in rows])

    def _row(self, terms: Sequence[Tensor]) -> Tensor:
        if not terms:
            return self.like.new_zeros(())
        summed = [self._sum_out(term) for term in terms]
        return sum(summed[1:], summed[0])

    def _sum_out(self, term: Tensor) -> Tensor:
        dims = [dim for dim in range(-term.dim(), 0) if dim not in self.kept]
        term = at_least_single(term)
        return term.sum(dims) if dims else term


def at_least_single(x: Tensor) -> Tensor:
    """Return a tensor in float32 if it has half precision, else unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
