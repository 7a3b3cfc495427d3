import copy
import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._random_states import RandomStates, random_states, set_random_states
from pyro_ext.distributed.joint_call import JointCall
from pyro_ext.infer.evidence.block_state import BlockDraws, BlockState
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.evidence import Evidence, concatenate
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.infer.evidence.particle_stream import ParticleStream
from pyro_ext.infer.evidence.row_count import RowCount
from pyro_ext.infer.evidence.unread_chunks import UnreadChunks
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
    :ivar call: the call, which divides blocks over the processes, or the draws of a single block.
    :ivar bar: a progress bar.
    """

    stream: ParticleStream
    orders: tuple[int, ...]
    target_std_error: float | None
    state: EvidenceState
    used: UsedValues | None
    rows: RowCount
    call: JointCall
    bar: "tqdm[Any]"
    parts: list[Evidence] = field(default_factory=list, init=False)
    position: int = field(default=0, init=False)
    num_rows: int = field(default=0, init=False)
    num_chunks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._by_block = self._by_draw = self.call.alone()
        self._unread = UnreadChunks(self.stream)
        self._block: DataBlock | None = None
        self._has_gap = False
        self._resume_from = self.state.latest
        self._caller_random_states: RandomStates | None = None

    def run(self, blocks: Iterator[DataBlock], first: DataBlock | None) -> Evidence:
        """Return the evidence of all blocks, or of the draws before an interrupt.

        :param blocks: the blocks of this process.
        :param first: a block with which to set up model and guide; None if the process has none.
        """
        self._block = first
        is_whole = first is not None and first.is_whole
        if is_whole:
            self._by_draw = self.call
        else:
            self._by_block = self.call
        try:
            self._set_up()
            self._run_rounds(blocks)
            if self._has_gap:
                raise ValueError(
                    f"{self.stream.owner}: data_loader has other numbers of batches on some ranks. "
                    "Pass a loader over all rows on each rank."
                )
            self.state.is_complete = True
            self.rows.check_total(self.num_rows)
        except (RuntimeError, ValueError, IndexError) as error:
            block = self._block
            is_ours = str(error).startswith(self.stream.owner)
            if block is not None and isinstance(block.subsamples, RowsOfPlate) and not is_ours:
                error.add_note(
                    f"With batch_size={block.subsamples.batch_size}, model and guide must index "
                    f"their data with the indices that pyro.plate('{block.plate}') yields, or use "
                    "pyro.subsample."
                )
            raise
        except KeyboardInterrupt:
            if self.call.interrupts or not self.parts:  # a second interrupt, or nothing to keep
                raise
            num_samples = min(part.num_samples for part in self.parts[-self._by_block.size :])
            rows = "" if is_whole else f" and {self.num_rows} data points"
            warnings.warn(
                f"{self.stream.owner} was interrupted. The result uses {num_samples} of "
                f"{self.stream.num_samples} draws{rows}.",
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
        if self.used is not None:
            self.used.end(self.call, self._block)
        return concatenate(self.parts, self.position)

    def _set_up(self) -> None:
        """Let model and guide make parameters and choose rows, equally in all processes."""
        if self.call.size == 1:
            return
        if self._block is not None:
            self.stream.set_up(self._block)
            self.state.num_rows = self._block.size
        self.call.check_parameters(self._block and self._block.programs)
        self.call.use_own_random_numbers()

    def _run_rounds(self, blocks: Iterator[DataBlock]) -> None:
        """Make the draws of all blocks. In a round, each process has one block."""
        is_at_end = False
        while not is_at_end:
            is_at_end = True
            for index, state, is_complete in self._by_block.parts(self._draw(blocks)):
                is_at_end = False
                self.state.is_complete &= is_complete
                self._add(index, state)

    def _add(self, index: int, state: BlockState) -> None:
        """Add the draws of a block that a process has made."""
        if index != len(self.parts):  # the process with the block before it may be interrupted
            self._has_gap = True
            return
        if self._by_block.size > 1:
            self._check_room(state, state.num_rows, index)
            self.num_chunks = max(self.num_chunks, state.draws.serial if state.draws else 0)
            if index % self._by_block.size != self._by_block.rank:
                self.bar.update(state.num_samples)
        self.state.blocks[index] = state
        self._finish(index)

    def _loaded(self, blocks: Iterator[DataBlock]) -> DataBlock | None:
        try:
            return next(blocks, None)
        except Exception:
            # An interrupt also reaches the workers of a loader, and makes them fail.
            self.call.interrupts.deliver()
            raise

    def _draw(self, blocks: Iterator[DataBlock]) -> Iterator[tuple[int, BlockState, bool]]:
        """Make the draws of the next block, and yield its state after each chunk."""
        block = self._loaded(blocks)
        if block is None:
            return
        self._block, index = block, block.index
        # A copy, because unread draws, and those that the others do not have yet, stay outside.
        state = copy.copy(self.state.blocks.get(index))
        if state is not None:
            yield index, state, self.state.is_complete
        if self.parts:
            self.call.interrupts.deliver()
        block.first_row += self.num_rows
        if self.used is not None:
            self.used.check_arguments(index, block)
        if state is not None and self._by_block.size == 1:
            self._check_room(state, state.num_rows, index)
        done = 0 if state is None else state.num_samples
        self.bar.update(done)
        if done >= self.stream.num_samples or (state is not None and self._is_reached(state)):
            return
        if self._resume_from is not None:
            self._resume(block, self._resume_from)
            self._resume_from = None
        if self.used is not None:
            self.used.begin(block)
        try:
            while done < self.stream.num_samples and not (state and self._is_reached(state)):
                sizes = self._by_draw.share(self.stream.num_samples - done, self.stream.chunk_size)
                states: RandomStates = {}
                for found, log_w, own_states in self._by_draw.parts(
                    self._chunk(index, block, state, size) for size in sizes
                ):
                    state, states = state or found, states or own_states
                    assert state is not None  # the first chunk comes with it
                    self.num_chunks += 1
                    state.add(log_w, self.orders, self.stream.num_samples, self.num_chunks, states)
                    done += len(log_w)
                    self.bar.update(len(log_w))
                    self.state.num_rows = block.size
                    self._show(state, block)
                    if self._unread.is_due:
                        self._read(index, state)
                    yield index, state, self.state.is_complete
        finally:
            if not self._unread.has_failed:
                self._read(index, state)

    def _read(self, index: int, state: BlockState | None) -> None:
        """Look at the draws so far, and keep them if they are good."""
        self._unread.read()
        if state is not None and self._by_block.size == 1:
            self.state.blocks[index] = copy.copy(state)

    def _chunk(
        self, index: int, block: DataBlock, state: BlockState | None, size: int
    ) -> tuple[BlockState | None, Tensor, RandomStates]:
        """Draw a chunk of a block.

        :returns: the block without draws if there is none yet, the log weights and random states.
        """
        particles = self._unread.draw(block, size)
        if self.call.size > 1:  # the others add the draws to their states
            self._unread.read()
        log_w = particles.log_w
        is_new = state is None
        if state is None:
            position = 0 if block.is_whole else block.position(particles.plates)
            plates = tuple(plate.name for plate in particles.plates)
            state = BlockState(plates, position, block.outer(particles), block.full_size(particles))
            if self._by_block.size == 1:
                self._check_room(state, log_w.shape[1 + position] if plates else 1, index)
        if self.used is not None:
            self.used.see(block, state, particles)
        if not block.is_whole:
            num_new = block.num_new_rows(particles)
            dim = 1 + state.position
            log_w = log_w.narrow(dim, log_w.shape[dim] - num_new, num_new)
        return state if is_new else None, log_w, random_states()

    def _resume(self, block: DataBlock, draws: BlockDraws) -> None:
        self.num_chunks = max(self.num_chunks, draws.serial)
        if self.state.is_complete or self.call.size > 1:
            # The random numbers after the saved state, or after a seed, may have been used
            # already, so a new seed is made from the saved state.
            saved = [draws.random_states["cpu"], *draws.random_states["cuda"]]
            digest = hashlib.sha256(b"".join(state.numpy().tobytes() for state in saved)).digest()
            seed = int.from_bytes(digest[:8])
            if self.call.size > 1:
                self.call.use_own_random_numbers(seed)
            else:
                self._caller_random_states = random_states()
                torch.manual_seed(seed)
        else:
            # A first run may draw extra numbers, for example to set up an automatic guide.
            self.stream.set_up(block)
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
