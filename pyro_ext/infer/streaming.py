"""Particles of a pair of programs in chunks, none of which is kept."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer.arguments import check_integer
from pyro_ext.infer.handlers import SharedSubsamples, is_delta
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.not_finite import raise_not_finite
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

    @property
    def is_vectorized(self) -> bool:
        """Whether several particles run at once."""
        return self._size > 1

    @property
    def _size(self) -> int:
        return self.chunk_size or min(self.num_samples, self.default_chunk_size)

    def draw(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[Particles, int, "tqdm[Any]"]]:
        """Particles, how many of them to use, and the progress bar, chunk by chunk."""
        # Never fewer than two at once: it takes two to see what depends on the particle.
        elbo = ImportanceWeightedELBO(
            max(self._size, 2),
            vectorize_particles=self.is_vectorized,
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
                self._check(particles, num_used)
                if start == 0:
                    _warn_of_points(particles)
                yield particles, num_used, bar
                bar.update(num_used)

    def _check(self, particles: Particles, num_used: int) -> None:
        log_w = particles.log_w[:num_used]
        for is_bad, value in ((log_w.isnan(), math.nan), (log_w.isposinf(), math.inf)):
            if is_bad.any():
                what = f"{self.owner}: a log weight{data_points(is_bad.any(0))}"
                raise_not_finite(what, value, particles)


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


def _warn_of_points(particles: Particles) -> None:
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
