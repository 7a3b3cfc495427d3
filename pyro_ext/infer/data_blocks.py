"""A data set in blocks of rows, which a pair of programs sees one after the other."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.infer.handlers import SharedSubsamples
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.plates import Plate


@dataclass
class DataBlock:
    """What the programs run on.

    :ivar args: positional arguments of both programs.
    :ivar kwargs: keyword arguments of both.
    :ivar subsamples: the handler that chooses the rows of plates.
    :ivar of_loader: the loader that the block is a batch of, or None.
    :ivar plate: the name of the plate of the rows; None if the block is all there is, or if it is
        the only common plate.
    :ivar first_row: the number of rows in earlier blocks.
    :ivar is_whole: whether the programs decide on the rows, and there are no other blocks.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    subsamples: SharedSubsamples = field(default_factory=SharedSubsamples)
    plate: str | None = None
    first_row: int = 0
    is_whole: bool = True
    of_loader: Iterable[Any] | None = None

    @property
    def size(self) -> int | None:
        """The number of rows in all blocks, if that is known."""
        return self.subsamples.size if isinstance(self.subsamples, RowsOfPlate) else None

    @property
    def num_blocks(self) -> int | None:
        """The number of blocks, if that is known."""
        if isinstance(self.subsamples, RowsOfPlate):
            return self.size and -(-self.size // self.subsamples.batch_size)
        return 1 if self.of_loader is None else length_hint(self.of_loader, 0) or None

    def position(self, plates: Sequence[Plate]) -> int:
        """Which of the common plates holds the rows."""
        names = [plate.name for plate in plates]
        if self.plate is None and len(names) == 1:
            return 0
        if self.plate not in names:
            found = f"the common plates {names}" if names else "none"
            raise ValueError(
                f"data_plate={self.plate!r}: expected the name of a plate around every latent site "
                f"and all that depends on one, so that rows have weights of their own; got {found}."
            )
        return names.index(self.plate)

    def offset(self, plates: Sequence[Plate]) -> tuple[int, ...]:
        """What to add to the indices of a data point in this block."""
        if self.is_whole:
            return ()
        position = self.position(plates)
        rows = self.subsamples
        start = rows.start if isinstance(rows, RowsOfPlate) else self.first_row
        return tuple(start * (i == position) for i in range(len(plates)))

    def num_new_rows(self, particles: Particles) -> int:
        """How many rows of the block, the last ones, no earlier block had."""
        plate = particles.plates[self.position(particles.plates)]
        if not isinstance(self.subsamples, RowsOfPlate):
            return plate.size
        if self.size is None:
            raise ValueError(f"data_plate={plate.name!r}: expected a plate with a size, got none.")
        return min(plate.size, self.size - self.first_row)

    def outer(self, particles: Particles) -> float:
        """The outer terms that no earlier block had."""
        if self.is_whole:
            return float(particles.outer)
        rows = particles.plates[self.position(particles.plates)]
        total = 0.0
        for term in particles.outer_terms:
            if rows.dim is not None and rows in term.plates:
                by_row = term.sum_to(frozenset({rows})).movedim(rows.dim, 0)
                new = by_row[-self.num_new_rows(particles) :]
                total += float(new.sum()) / rows.subsampling_scale
            elif self.first_row == 0:
                total += float(term.value.sum())
        return total


class RowsOfPlate(SharedSubsamples):
    """Chooses the rows of one plate, block by block, and shares the indices of other plates.

    :param str plate: the name of the plate.
    :param int batch_size: the number of rows in a block, but for the last.
    :param int size: the size of the plate, if it is known before the programs run.
    """

    def __init__(self, plate: str, batch_size: int, size: int | None = None) -> None:
        super().__init__()
        self.plate = plate
        self.batch_size = batch_size
        self.size = size
        self.first_row = self.start = 0

    def _pyro_sample(self, msg: Any) -> None:
        if not (site_is_subsample(msg) and msg["name"] == self.plate):
            super()._pyro_sample(msg)
            return
        self.size = size = msg["fn"].size
        own_size = msg["fn"].subsample_size
        stop = min(self.first_row + self.batch_size, size)
        # A plate with a subsample size insists on it: the last block goes back over known rows.
        self.start = self.first_row if own_size is None else max(0, stop - own_size)
        rows = torch.arange(self.start, stop, device=msg["fn"].device)
        found = None
        if own_size is not None and own_size != min(self.batch_size, size):
            found = f"subsample_size={own_size}"
        elif msg["value"] is not None and not torch.equal(torch.as_tensor(msg["value"]), rows):
            found = "rows of its own"  # a model that is replayed has those of the guide
        if found:
            raise ValueError(
                f"batch_size={self.batch_size}: expected plate '{self.plate}' to have the "
                f"subsample_size={self.batch_size} or none, and to use the indices that it yields; "
                f"got {found}. An automatic guide has the sizes of the first run, unless "
                "create_plates says otherwise."
            )
        msg["value"] = rows
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] != self.plate:
            super()._pyro_post_sample(msg)


def blocks_of_plate(
    rows: RowsOfPlate, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[DataBlock]:
    """The rows of a plate, in order. Between the blocks, the programs have to run once."""
    while rows.size is None or rows.first_row < rows.size:
        yield DataBlock(args, kwargs, rows, rows.plate, rows.first_row, is_whole=False)
        rows.first_row += rows.batch_size


def blocks_of_loader(
    loader: Iterable[Any], plate: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[DataBlock]:
    """The batches of a loader, each as arguments before the others."""
    for batch in loader:
        if isinstance(batch, Mapping):
            of_batch: tuple[tuple[Any, ...], dict[str, Any]] = ((), dict(batch))
        elif isinstance(batch, Tensor) or not isinstance(batch, Sequence):
            of_batch = ((batch,), {})
        else:
            of_batch = (tuple(batch), {})
        yield DataBlock(
            (*of_batch[0], *args),
            kwargs | of_batch[1],
            plate=plate,
            is_whole=False,
            of_loader=loader,
        )
