"""Particles of a pair of programs in chunks, none of which is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.handlers import SharedSubsamples
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.particles import Particles


@dataclass(frozen=True)
class ParticleStream:
    """The draws that an estimate by importance sampling is made of.

    :ivar owner: the name of the estimate, for errors.
    :ivar model: the model.
    :ivar guide: the guide; None for the prior.
    :ivar num_samples: the number of draws.
    :ivar chunk_size: how many run at once, vectorised unless it is 1; None for the default.
    :ivar default_chunk_size: that one, unless the draws are fewer.
    :ivar max_plate_nesting: the number of nested plates; guessed if infinite.
    :ivar progress_bar: whether to show one.
    """

    owner: str
    model: Callable
    guide: Callable | None
    num_samples: int
    chunk_size: int | None
    default_chunk_size: int
    max_plate_nesting: float = math.inf
    progress_bar: bool = False

    def __post_init__(self) -> None:
        check_integer(self.owner, "num_samples", self.num_samples, 1)
        if self.chunk_size is not None:
            check_integer(self.owner, "chunk_size", self.chunk_size, 1)

    def draw(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[Particles, int, "tqdm[Any]"]]:
        """Particles, how many of them to use, and the progress bar, chunk by chunk."""
        chunk_size = self.chunk_size or min(self.num_samples, self.default_chunk_size)
        # Never fewer than two at once: it takes two to see what depends on the particle.
        elbo = ImportanceWeightedELBO(
            max(chunk_size, 2),
            vectorize_particles=chunk_size > 1,
            max_plate_nesting=self.max_plate_nesting,
        )
        guide = PriorProposal(self.model) if self.guide is None else self.guide
        subsamples = SharedSubsamples()
        hidden = not self.progress_bar
        with tqdm(total=self.num_samples, desc=self.owner, unit="draw", disable=hidden) as bar:
            for start in range(0, self.num_samples, elbo.num_particles):
                rest = self.num_samples - start
                num_particles = max(2, min(elbo.num_particles, rest))
                particles = elbo.trace_particles(
                    self.model, guide, args, kwargs, subsamples, num_particles
                )
                num_used = min(num_particles, rest)
                yield particles, num_used, bar
                bar.update(num_used)


class PriorProposal:
    """The prior of a model as a guide: its latent sites, without what is observed."""

    def __init__(self, model: Callable) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Draws the latent sites."""
        with poutine.block(hide_fn=lambda msg: msg["type"] == "sample" and msg["is_observed"]):
            self.model(*args, **kwargs)


def data_points(chosen: Tensor, most: int = 5) -> str:
    """Names the data points that are chosen, for a message; empty if there is only one in all."""
    if chosen.dim() == 0:
        return ""
    indices = [tuple(row) if len(row) > 1 else row[0] for row in chosen.nonzero().tolist()]
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f" for data points {indices[:most]}{more}, of {chosen.numel()}"
