import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_ext._interruption import Interrupts
from pyro_ext._random_states import RandomStates, random_states, set_random_states
from pyro_ext.infer.evidence.block_state import BlockDraws, BlockState
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.evidence import Evidence, concatenate
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.infer.evidence.row_count import RowCount
from pyro_ext.infer.evidence.used_values import UsedValues
from pyro_ext.tracing.failures import data_points
from pyro_ext.tracing.shared_values import RowsOfPlate


@dataclass
class EvidenceSampler:
    """A sampler that makes the draws for one block of data after another.

    :ivar stream: the stream of draws.
    :ivar orders: the orders of the jackknife.
    :ivar target_std_error: the standard error at which to stop; None to make all draws.
    :ivar state: the state, with the statistics of each block.
    :ivar used: the values that model and guide use, compared with those of the state; None if no
        later call may continue from the state.
    :ivar rows: the number of rows that a loader must have.
    :ivar interrupts: the interrupts that wait for the end of a chunk.
    :ivar bar: a progress bar.
    """

    stream: ParticleStream
    orders: tuple[int, ...]
    target_std_error: float | None
    state: EvidenceState
    used: UsedValues | None
    rows: RowCount
    interrupts: Interrupts
    bar: "tqdm[Any]"
    parts: list[Evidence] = field(default_factory=list, init=False)
    position: int = field(default=0, init=False)
    num_rows: int = field(default=0, init=False)
    num_chunks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._resume_from = self.state.latest
        self._caller_random_states: RandomStates | None = None

    def run(self, blocks: Iterator[DataBlock]) -> Evidence:
        """Return the evidence of all blocks, or of the draws before an interrupt."""
        block = None
        try:
            for index, block in enumerate(self._loaded(blocks)):
                if self.parts:
                    self.interrupts.deliver()
                if not block.is_whole:
                    block.first_row = self.num_rows
                if self.used is not None:
                    self.used.check_arguments(index, block)
                self._draw(index, block)
                self._finish(index)
            self.state.is_complete = True
            self.rows.check_total(self.num_rows)
        except (RuntimeError, ValueError, IndexError) as error:
            is_ours = str(error).startswith(self.stream.owner)
            if block is not None and isinstance(block.subsamples, RowsOfPlate) and not is_ours:
                error.add_note(
                    f"With batch_size={block.subsamples.batch_size}, model and guide must index "
                    f"their data with the indices that pyro.plate('{block.plate}') yields, or use "
                    "pyro.subsample."
                )
            raise
        except KeyboardInterrupt:
            if self.interrupts:  # this is a second interrupt
                raise
            unfinished = len(self.parts)
            if unfinished in self.state.blocks:
                self._finish(unfinished)
            if not self.parts:
                raise
            rows = "" if block is None or block.is_whole else f" and {self.num_rows} data points"
            warnings.warn(
                f"{self.stream.owner} was interrupted. The result uses "
                f"{self.parts[-1].num_samples} of {self.stream.num_samples} draws{rows}.",
                stacklevel=3,
            )
        finally:
            if self._caller_random_states is not None:
                set_random_states(self._caller_random_states)
            if self.used is not None:
                self.used.remember()
        if not self.parts:
            raise ValueError(
                f"{self.stream.owner}: data_loader has no batches. It must have at least one."
            )
        if self.used is not None and block is not None:
            self.used.check_programs(block)
        return concatenate(self.parts, self.position)

    def _loaded(self, blocks: Iterator[DataBlock]) -> Iterator[DataBlock]:
        try:
            yield from blocks
        except Exception:
            # An interrupt also reaches the workers of a loader, and makes them fail.
            self.interrupts.deliver()
            raise

    def _draw(self, index: int, block: DataBlock) -> None:
        state = self.state.blocks.get(index)
        if state is not None:
            self._check_room(state, state.num_rows, index)
        start = 0 if state is None else state.num_samples
        self.bar.update(start)
        if start >= self.stream.num_samples or (state is not None and self._is_reached(state)):
            return
        if self._resume_from is not None:
            self._resume(block, self._resume_from)
            self._resume_from = None
        if self.used is not None:
            self.used.begin(block)
        for particles in self.stream.draw(block, start, self.bar):
            log_w = particles.log_w
            if state is None:
                position = 0 if block.is_whole else block.position(particles.plates)
                plates = tuple(plate.name for plate in particles.plates)
                state = BlockState(
                    plates, position, block.outer(particles), block.full_size(particles)
                )
                self._check_room(state, log_w.shape[1 + position] if plates else 1, index)
            if self.used is not None:
                self.used.see(block, state, particles)
            if not block.is_whole:
                num_new = block.num_new_rows(particles)
                dim = 1 + state.position
                log_w = log_w.narrow(dim, log_w.shape[dim] - num_new, num_new)
            del particles
            self.num_chunks += 1
            state.add(log_w, self.orders, self.stream.num_samples, self.num_chunks)
            self.state.blocks[index] = state
            self.state.num_rows = block.size
            self._show(state, block)
            self.interrupts.deliver()
            if self._is_reached(state):
                break

    def _resume(self, block: DataBlock, draws: BlockDraws) -> None:
        self.num_chunks = draws.serial
        if self.state.is_complete:
            # The random numbers after the saved state, or after a seed, may have been used
            # already, so a new seed is made from the saved state.
            saved = [draws.random_states["cpu"], *draws.random_states["cuda"]]
            digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in saved)).digest()
            self._caller_random_states = random_states()
            torch.manual_seed(int.from_bytes(digest[:8]))
        else:
            # A first run may draw extra numbers, for example to set up an automatic guide.
            self.stream.run(block, min(2, self.stream.chunk_size))
            set_random_states(draws.random_states)
        self.state.is_complete = False

    def _finish(self, index: int) -> None:
        state = self.state.blocks[index]
        part = state.to_evidence(self.orders)
        is_zero = part.log_evidence.isneginf()
        if is_zero.any():
            offset = [self.num_rows * (i == state.position) for i in range(is_zero.dim())]
            raise ValueError(
                f"{self.stream.owner}: all {part.num_samples} weights are "
                f"zero{data_points(is_zero, tuple(offset))}. The support of the guide misses the "
                "values that the data allow. Use a guide that draws them, such as a wider one."
            )
        self.parts.append(part)
        self.position = state.position
        if part.plates:
            self.num_rows += part.log_evidence.shape[state.position]
        if self.used is None:
            del self.state.blocks[index]

    def _check_room(self, state: BlockState, num_rows: int, index: int) -> None:
        self.rows.check_room(state, self.num_rows + num_rows, index)

    def _is_reached(self, state: BlockState) -> bool:
        if self.target_std_error is None or state.draws is None or state.num_samples < 100:
            return False
        return bool((state.draws.statistics.std_error <= self.target_std_error).all())

    def _show(self, state: BlockState, block: DataBlock) -> None:
        if self.bar.disable or state.draws is None:
            return
        self.bar.total = block.num_blocks and block.num_blocks * self.stream.num_samples
        means = [part.log_evidence for part in self.parts] + [state.draws.statistics.log_mean]
        total = sum(mean.sum().item() for mean in means)
        self.bar.set_postfix_str(f"{total / sum(mean.numel() for mean in means):.4f} nats")
