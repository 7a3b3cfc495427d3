"""Particles of a pair of programs in chunks, none of which is kept."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.data_blocks import DataBlock
from pyro_ext.infer.handlers import is_delta
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.not_finite import raise_not_finite
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.proposals import PriorProposal
from pyro_ext.infer.tracing import ParticleTraces


class ParticleStream:
    """The draws that an estimate by importance sampling is made of.

    :param str owner: the name of the estimate, for errors.
    :param model: the model.
    :param guide: the guide; None for the prior.
    :param int num_samples: the number of draws.
    :param int chunk_size: how many run at once, vectorised unless it is 1; None for the default.
    :param int default_chunk_size: that one, unless the draws are fewer.
    :param max_plate_nesting: the number of nested plates; guessed if infinite.
    """

    def __init__(
        self,
        owner: str,
        model: Callable,
        guide: Callable | None,
        num_samples: int,
        chunk_size: int | None,
        default_chunk_size: int,
        max_plate_nesting: float = math.inf,
    ) -> None:
        check_integer(owner, "num_samples", num_samples, 1)
        if chunk_size is not None:
            check_integer(owner, "chunk_size", chunk_size, 1)
        size = chunk_size or min(num_samples, default_chunk_size)
        self.owner = owner
        self.model = model
        self.guide = PriorProposal(model) if guide is None else guide
        self.num_samples = num_samples
        self.is_vectorized = size > 1
        # Never fewer than two at once: it takes two to see what depends on the particle.
        self._elbo = ImportanceWeightedELBO(
            max(size, 2), vectorize_particles=size > 1, max_plate_nesting=max_plate_nesting
        )
        self._was_looked_at = False

    def draw(
        self, block: DataBlock, start: int = 0, bar: "tqdm[Any] | None" = None
    ) -> Iterator[tuple[Particles, int]]:
        """Particles, and how many of them to use, chunk by chunk.

        :param DataBlock block: what the programs run on.
        :param int start: how many draws there are already.
        :param bar: a progress bar to count them on.
        """
        for first in range(start, self.num_samples, self._elbo.num_particles):
            rest = self.num_samples - first
            num_particles = max(2, min(self._elbo.num_particles, rest))
            particles = self.run(block, num_particles)
            num_used = min(num_particles, rest)
            self._check(particles, num_used, block)
            if not self._was_looked_at:
                warn_of_points(particles)
                self._was_looked_at = True
            yield particles, num_used
            del particles  # nothing of one chunk is to live while another runs
            if bar is not None:
                bar.update(num_used)

    def run(self, block: DataBlock, num_particles: int = 2) -> Particles:
        """Some particles."""
        return self._elbo.trace_particles(
            self.model, self.guide, block.args, block.kwargs, block.subsamples, num_particles
        )

    def _check(self, particles: Particles, num_used: int, block: DataBlock) -> None:
        log_w = particles.log_w[:num_used]
        for is_bad, value in ((log_w.isnan(), math.nan), (log_w.isposinf(), math.inf)):
            if is_bad.any():
                where = data_points(is_bad.any(0), block.offset(particles.plates))
                raise_not_finite(f"{self.owner}: a log weight{where}", value, particles)


def data_points(chosen: Tensor, offset: tuple[int, ...] = (), most: int = 5) -> str:
    """Names the data points that are chosen, for a message; empty if there is only one in all.

    :param tuple offset: what to add to their indices.
    """
    if chosen.dim() == 0:
        return ""
    shift = torch.tensor(offset or (0,) * chosen.dim(), device=chosen.device)
    rows = (chosen.nonzero() + shift).tolist()
    indices = [tuple(row) if len(row) > 1 else row[0] for row in rows]
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    of = f"{chosen.numel()} in this block" if any(offset) else chosen.numel()
    return f" for data points {indices[:most]}{more}, of {of}"


def warn_of_points(particles: Particles | ParticleTraces) -> None:
    """Warns of sites that a guide puts at one point."""
    site: Any
    for name, site in particles.guide_traces[0].iter_stochastic_nodes():
        if not is_delta(site["fn"]):
            continue
        draws = site["value"]
        if len(particles.guide_traces) > 1:
            traces: Any = [trace for trace in particles.guide_traces if name in trace.nodes]
            draws = torch.stack([trace.nodes[name]["value"] for trace in traces])
        if bool((draws == draws[:1]).all()):
            warnings.warn(
                f"The guide puts site '{name}' at one point (Delta): expected a distribution. "
                "The weights are then densities at that point, and the result is no evidence.",
                stacklevel=5,
            )
