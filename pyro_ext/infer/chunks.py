"""Many particles at the memory of a few: the graph of one chunk of particles at a time.

A first pass without a graph yields all the log weights, hence the coefficients of every particle.
A second one runs each chunk again from the same random state and differentiates a surrogate that is
linear in its particles.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_ext.infer.gradients import Bound
from pyro_ext.infer.handlers import SharedSubsamples
from pyro_ext.infer.not_finite import raise_not_finite
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.random_state import get_random_state, set_random_state

TraceChunk = Callable[[SharedSubsamples, int], Particles]


def chunk_sizes(num_particles: int, chunk_size: int) -> list[int]:
    """Sizes of at most ``chunk_size``, but for a last one that takes in a rest of one particle.

    One particle runs without the particle dim, and does not show what depends on it.
    """
    sizes = [chunk_size] * (num_particles // chunk_size)
    rest = num_particles - sum(sizes)
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def first_pass(trace: TraceChunk, sizes: Sequence[int]) -> tuple[Tensor, Particles, list[Any]]:
    """All log weights without a graph, the last chunk, and the random state before each chunk.

    :param trace: traces a number of particles under given minibatch indices.
    """
    subsamples = SharedSubsamples()
    log_w, states = [], []
    with torch.no_grad():
        for size in sizes:
            states.append(get_random_state())
            particles = trace(subsamples, size)
            if particles.log_w.isnan().any():
                raise_not_finite("A log weight", math.nan, particles)
            log_w.append(particles.log_w)
    return torch.cat(log_w), particles, states


def second_pass(
    trace: TraceChunk, sizes: Sequence[int], states: Sequence[Any]
) -> Iterator[tuple[slice, Particles]]:
    """Each chunk once more, with its graph; the random state ends where it was."""
    end = get_random_state()
    # Of its own: the minibatch is drawn again, as in the first pass.
    subsamples = SharedSubsamples()
    start = 0
    for size, state in zip(sizes, states, strict=True):
        set_random_state(state)
        yield slice(start, start + size), trace(subsamples, size)
        start += size
    set_random_state(end)


class ChunkOfBound:
    """A bound of K particles as one chunk of them sees it: a linear function of its log weights.

    :param bound: the bound.
    :param torch.Tensor log_w: the log weights of all K particles, detached.
    :param slice particles: which of them are in the chunk.
    :param bool has_score: whether the guide has non-reparameterised sites.
    """

    def __init__(self, bound: Bound, log_w: Tensor, particles: slice, has_score: bool) -> None:
        first, second = bound.first_and_second(log_w)
        self._first_and_second = first[particles], second[particles]
        self._signal = bound.signal(log_w)[particles] if has_score else None
        self._guide_bound = (
            self
            if bound.guide_bound is bound
            else ChunkOfBound(bound.guide_bound, log_w, particles, has_score)
        )

    def bound(self, log_w: Tensor) -> Tensor:
        """A function with the bound's derivatives in the chunk's log weights."""
        # Weights of zero have zero coefficients: 0 x inf would be NaN.
        return (self._first_and_second[0] * log_w.masked_fill(log_w.isinf(), 0.0)).sum(0)

    def first_and_second(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk's share of the bound's derivatives."""
        return self._first_and_second

    def signal(self, log_w: Tensor) -> Any:
        """The chunk's share of the bound's signal."""
        return self._signal

    @property
    def guide_bound(self) -> "ChunkOfBound":
        """The chunk of the bound that the guide is trained on."""
        return self._guide_bound
