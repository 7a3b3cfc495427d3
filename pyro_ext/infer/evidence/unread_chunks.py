"""Chunks of draws whose log weights no one has looked at yet."""

import math
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ext._random_states import RandomStates, random_states, set_random_states
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.tracing import Particles

#: The largest number of chunks, and the time in seconds, from one look to the next.
_MOST_CHUNKS, _MOST_SECONDS = 64, 1.0


class _Chunk(NamedTuple):
    """A chunk, with what it takes to draw it again."""

    is_good: Tensor
    num_particles: int
    states: RandomStates


class UnreadChunks:
    """The chunks of a block that may have NaN or infinite log weights.

    A look at their values waits for a GPU, so it is made for many chunks at once. A bad chunk is
    drawn again by the programs, which name the site.

    :param stream: the stream of draws.

    :ivar has_failed: whether a look has found a bad chunk.
    """

    def __init__(self, stream: ParticleStream) -> None:
        self._stream = stream
        self.has_failed = False
        self._chunks: list[_Chunk] = []
        self._block: DataBlock | None = None
        self._last = perf_counter()

    @property
    def is_due(self) -> bool:
        """Whether it is time to look."""
        late = perf_counter() - self._last > _MOST_SECONDS
        return late or len(self._chunks) >= _MOST_CHUNKS

    def draw(self, block: DataBlock, num_particles: int) -> Particles:
        """Return a chunk of draws, whose log weights :meth:`read` looks at if no one else has."""
        states = random_states()
        particles, is_unread = self._stream.draw_unread(block, num_particles)
        if is_unread:
            is_good = particles.log_w.amax() < math.inf  # False for NaN
            self._chunks.append(_Chunk(is_good, num_particles, states))
            self._block = block
        return particles

    def read(self) -> None:
        """Look at the log weights since the last look.

        :raises ValueError: if one is NaN or infinite.
        """
        chunks, self._chunks, self._last = self._chunks, [], perf_counter()
        if not chunks or torch.stack([chunk.is_good for chunk in chunks]).all():
            return
        assert self._block is not None  # there are chunks of it
        bad = next(chunk for chunk in chunks if not chunk.is_good)
        self.has_failed = True
        set_random_states(bad.states)
        self._stream.draw(self._block, bad.num_particles)
        raise ValueError(
            f"{self._stream.owner}: a log weight is NaN or infinite, but not in a second run of "
            "model and guide from the same random numbers. Remove what changes between their runs."
        )
