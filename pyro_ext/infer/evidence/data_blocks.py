"""Blocks of rows of a data set, on which model and guide run one after the other."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import length_hint
from typing import Any

from torch import Tensor

from pyro_ext.infer.evidence.own_batches import Batch
from pyro_ext.tracing import Particles, Programs
from pyro_ext.tracing.density_sites import Plate
from pyro_ext.tracing.shared_values import RowsOfPlate, SharedSubsamples


@dataclass
class DataBlock:
    """A block of data, with the model and guide that run on it.

    :ivar programs: the model and guide, with their arguments for this block.
    :ivar subsamples: the handler that chooses the rows of plates.
    :ivar plate: the name of the plate of the rows; None if there is only one block, or only one
        common plate.
    :ivar index: the number of earlier blocks.
    :ivar first_row: the number of rows in earlier blocks, of this round when it is made.
    :ivar is_whole: whether there is only one block, whose rows model and guide choose themselves.
    :ivar of_loader: the loader whose batch the block is; None without a loader.
    """

    programs: Programs
    subsamples: SharedSubsamples = field(default_factory=SharedSubsamples)
    plate: str | None = None
    index: int = 0
    first_row: int = 0
    is_whole: bool = True
    of_loader: Iterable[Any] | None = None

    @property
    def size(self) -> int | None:
        """The number of rows in all blocks; None if it is not known."""
        return self.subsamples.size if isinstance(self.subsamples, RowsOfPlate) else None

    @property
    def num_blocks(self) -> int | None:
        """The number of blocks; None if it is not known."""
        if isinstance(self.subsamples, RowsOfPlate):
            return self.size and -(-self.size // self.subsamples.batch_size)
        return 1 if self.of_loader is None else length_hint(self.of_loader, 0) or None

    def position(self, plates: Sequence[Plate]) -> int:
        """Return the position of the plate of the rows among the common plates.

        :param plates: the common plates.
        :raises ValueError: if the plate of the rows is not a common plate.
        """
        names = [plate.name for plate in plates]
        if self.plate is None and len(names) == 1:
            return 0
        if self.plate not in names:
            advice = (
                f"Pass one of {names}."
                if names
                else "There is no such plate: use all rows at once."
            )
            raise ValueError(
                "estimate_evidence: data_plate must be the name of a plate around every latent "
                "site and every site that depends on one, so that each row has its own weights, "
                f"but it is {self.plate!r}. {advice}"
            )
        return names.index(self.plate)

    def offset(self, plates: Sequence[Plate]) -> tuple[int, ...]:
        """Return the numbers to add to the indices of a data point in this block.

        :param plates: the common plates, each of which gets a number.
        """
        if self.is_whole:
            return ()
        position = self.position(plates)
        rows = self.subsamples
        start = rows.start if isinstance(rows, RowsOfPlate) else self.first_row
        return tuple(start * (i == position) for i in range(len(plates)))

    def num_new_rows(self, particles: Particles) -> int:
        """Return the number of rows of the block that no earlier block had.

        They are the last rows of the block.
        """
        plate = particles.plates[self.position(particles.plates)]
        if not isinstance(self.subsamples, RowsOfPlate):
            return plate.size
        if self.size is None:
            raise ValueError(
                f"estimate_evidence: plate '{plate.name}' has no size. data_plate must be the name "
                "of a plate with a size."
            )
        return min(plate.size, self.size - self.first_row)

    def full_size(self, particles: Particles) -> int | None:
        """Return the number of rows that the batches of a loader must have; None if not known.

        It is known if the plate of the rows has a size, of which a batch is a part.
        """
        if self.of_loader is None:
            return None
        plate = particles.plates[self.position(particles.plates)]
        return None if plate.full_size == plate.size else plate.full_size

    def outer(self, particles: Particles) -> float:
        """Return the sum of the outer terms that no earlier block had."""
        if self.is_whole:
            return particles.unscaled_outer
        rows = particles.plates[self.position(particles.plates)]
        total = 0.0
        for term in particles.unscaled_outer_terms:
            if rows.dim is not None and rows in term.plates:
                by_row = term.sum_to(frozenset({rows})).movedim(rows.dim, 0)
                new = by_row[-self.num_new_rows(particles) :]
                total += float(new.sum()) / rows.subsampling_scale
            elif self.index == 0:
                total += float(term.value.sum())
        return total


def blocks_of_plate(
    programs: Programs, rows: RowsOfPlate, rank: int, num_processes: int
) -> Iterator[DataBlock]:
    """Yield the rows of a plate in blocks, in order. Each process has every P-th block.

    Model and guide have to run once between two blocks, and before the first one of ranks > 0.
    """
    for index in itertools.count(rank, num_processes):
        rows.first_row = index * rows.batch_size
        if rows.size is not None and rows.first_row >= rows.size:
            return
        before = rank * rows.batch_size
        yield DataBlock(programs, rows, rows.plate, index, before, is_whole=False)


def blocks_of_loader(
    programs: Programs, batches: Iterable[Batch], loader: Iterable[Any], plate: str | None
) -> Iterator[DataBlock]:
    """Yield the batches of a loader as blocks.

    A batch becomes the first positional arguments, or keyword arguments if it is a mapping.

    :param batches: the batches that belong to this process.
    """
    for index, rows_before, batch in batches:
        if isinstance(batch, Mapping):
            args, kwargs = programs.args, {**programs.kwargs, **batch}
        else:
            is_single = isinstance(batch, Tensor) or not isinstance(batch, Sequence)
            first = (batch,) if is_single else tuple(batch)
            args, kwargs = (*first, *programs.args), {**programs.kwargs}
        yield DataBlock(
            replace(programs, args=args, kwargs=kwargs),
            plate=plate,
            index=index,
            first_row=rows_before,
            is_whole=False,
            of_loader=loader,
        )
