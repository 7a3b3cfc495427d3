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
from pyro_ext.ops.random_state import get_random_state, set_random_state

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


class LinearBound:
    """A bound of K particles for given log weights: the linear function with its derivatives.

    Being linear, it can be taken in parts, one chunk of particles at a time.

    :param tuple first_and_second: the bound's derivatives, each of shape ``(K, *common)``.
    :param torch.Tensor signal: its signal, likewise; None if no site needs one.
    :param LinearBound guide_bound: that of the guide; None if it is this one.
    """

    def __init__(
        self,
        first_and_second: tuple[Tensor, Tensor],
        signal: Tensor | None,
        guide_bound: "LinearBound | None",
    ) -> None:
        self._first_and_second = first_and_second
        self._signal = signal
        self._guide_bound = guide_bound

    def part(self, particles: slice) -> "LinearBound":
        """The same for some of the particles."""
        first, second = self._first_and_second
        return LinearBound(
            (first[particles], second[particles]),
            None if self._signal is None else self._signal[particles],
            None if self._guide_bound is None else self._guide_bound.part(particles),
        )

    def bound(self, log_w: Tensor) -> Tensor:
        """The linear function; its value means nothing."""
        # Weights of zero have zero coefficients: 0 x inf would be NaN.
        return (self._first_and_second[0] * log_w.masked_fill(log_w.isinf(), 0.0)).sum(0)

    def first_and_second(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives, whatever the log weights."""
        return self._first_and_second

    def signal(self, log_w: Tensor) -> Any:
        """The signal, whatever the log weights."""
        return self._signal

    @property
    def guide_bound(self) -> "LinearBound":
        """The bound that the guide is trained on."""
        return self if self._guide_bound is None else self._guide_bound


def linearize(bound: Bound, log_w: Tensor, has_score: bool) -> LinearBound:
    """The linear function with the derivatives of a bound at the log weights of all particles.

    :param bool has_score: whether the guide has non-reparameterised sites.
    """
    return LinearBound(
        bound.first_and_second(log_w),
        bound.signal(log_w) if has_score else None,
        None if bound.guide_bound is bound else linearize(bound.guide_bound, log_w, has_score),
    )
