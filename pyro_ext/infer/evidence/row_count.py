"""A check that the batches of a loader hold each row of the data once."""

import warnings
from dataclasses import dataclass, field

from pyro_ext.infer.evidence.block_state import BlockState


@dataclass
class RowCount:
    """The number of rows that the batches must have in all, as far as it is known.

    It is known if the user gives it, or if the plate of the rows has a size of its own, as in
    ``pyro.plate("data", size, subsample=x)``.

    :ivar owner: the name of the estimate, for messages.
    :ivar num_rows: the number that the user gives; None if the plate tells it.
    """

    owner: str
    num_rows: int | None = None
    plate: str = field(default="", init=False)
    sizes: set[int] = field(default_factory=set, init=False)

    @property
    def expected(self) -> int | None:
        """The number of rows in all; None if it is not known."""
        if self.num_rows is not None:
            return self.num_rows
        return next(iter(self.sizes)) if len(self.sizes) == 1 else None

    def check_room(self, state: BlockState, total: int, index: int) -> None:
        """Raise a ValueError if there are too many rows.

        :param state: the block that was seen last.
        :param total: the number of rows in it and in earlier blocks.
        :param index: its index.
        """
        if state.full_size is not None:
            self.sizes.add(state.full_size)
            self.plate = state.plates[state.position]
        if self.expected is not None and total > self.expected:
            raise ValueError(
                f"{self.owner}: the first {index + 1} batches of data_loader have {total} rows, "
                f"but {self._origin} {self.expected}. A row that comes twice would count twice. "
                "Pass each row once. If the batches hold other rows than those of training, pass "
                "their number as num_rows=."
            )

    def check_total(self, total: int) -> None:
        """Raise a ValueError, or warn, if there were too few rows.

        :param total: the number of rows in all blocks.
        """
        if self.expected is None or total == self.expected:
            return
        if self.num_rows is not None:
            raise ValueError(
                f"{self.owner}: the batches of data_loader have {total} rows, but {self._origin} "
                f"{self.expected}. Pass all rows (drop_last=False), or the number that they have."
            )
        warnings.warn(
            f"{self.owner}: the result covers {total} rows, but {self._origin} {self.expected}. A "
            "loader with drop_last=True leaves rows out. If the batches hold all the rows that you "
            f"mean, such as held-out ones, pass num_rows={total}.",
            stacklevel=4,
        )

    @property
    def _origin(self) -> str:
        return (
            "num_rows is" if self.num_rows is not None else f"the size of plate '{self.plate}' is"
        )
