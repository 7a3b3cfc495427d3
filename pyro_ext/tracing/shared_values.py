"""Handlers that share minibatches or global draws between runs, or visit rows in blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ext.tracing.programs import Programs
from pyro_ext.tracing.sites import SiteError, lies_in


class SharedSubsamples(Messenger):
    """A handler that gives every run the minibatch indices of the first run.

    :ivar indices: a dict from the name of a plate to its indices.
    :ivar given: the names of the plates whose indices the programs choose themselves.
    :ivar drawn: the names of the plates whose indices are drawn at random.

    :param indices: the indices of the first run, too, by the name of the plate.
    """

    def __init__(self, indices: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.indices: dict[str, Any] = dict(indices or {})
        self.given: set[str] = set()
        self.drawn: set[str] = set()

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The indices that the programs do not choose themselves; None before they are known."""
        return {name: self.indices[name] for name in self.drawn}

    def _pyro_sample(self, msg: Message) -> None:
        if not site_is_subsample(msg):
            return
        if msg["value"] is not None and msg["name"] not in self.indices:
            self.given.add(str(msg["name"]))
        if msg["value"] is None and msg["name"] in self.indices:
            msg["value"] = self.indices[msg["name"]]
            msg["done"] = True
        fn: Any = msg["fn"]
        if msg["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
            self.drawn.add(str(msg["name"]))

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.indices.setdefault(str(msg["name"]), msg["value"])


def with_one_minibatch(programs: Programs, subsamples: SharedSubsamples | None) -> Programs:
    """Return model and guide that have the same minibatch at every run.

    :param subsamples: the minibatch indices. With None, the first run draws them.
    """
    rows = subsamples or SharedSubsamples()
    return programs.each_under(rows, rows)


class SharedGlobals(Messenger):
    """A handler that gives every run the draws of the first run outside of a plate.

    :param plate: the name of the plate.
    """

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.values: dict[str, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if msg["value"] is None and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg) or lies_in(msg, self.plate)):
            self.values.setdefault(str(msg["name"]), msg["value"])


class RowsOfPlate(SharedSubsamples):
    """A handler that visits the rows of one plate in blocks.

    It also shares the minibatch indices of other plates between runs.

    :param plate: the name of the plate.
    :param batch_size: the number of rows in a block. The last block may have fewer.
    :param size: the size of the plate; None if it is not known before model and guide run.
    """

    def __init__(self, plate: str, batch_size: int, size: int | None = None) -> None:
        super().__init__()
        self.plate = plate
        self.batch_size = batch_size
        self.size = size
        self.first_row = self.start = 0
        self._fn: Any = None

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The indices that the programs do not choose themselves; None before they are known."""
        found = super().chosen
        return None if self._fn is None or found is None else {**found, self.plate: self._rows()}

    def _rows(self) -> Tensor:
        """Return the rows of the present block, for the plate of the last run."""
        size, own_size = self._fn.size, self._fn.subsample_size
        stop = min(self.first_row + self.batch_size, size)
        # Blocks of a plate with a subsample size all have this size, so the last one may overlap.
        self.start = self.first_row if own_size is None else max(0, stop - own_size)
        return torch.arange(self.start, stop, device=self._fn.device)

    def _pyro_sample(self, msg: Message) -> None:
        if not (site_is_subsample(msg) and msg["name"] == self.plate):
            super()._pyro_sample(msg)
            return
        fn: Any = msg["fn"]
        self._fn = fn
        self.size = size = fn.size
        own_size = fn.subsample_size
        rows = self._rows()
        found = None
        if own_size is not None and own_size != min(self.batch_size, size):
            found = f"subsample_size={own_size}"
        elif msg["value"] is not None and not torch.equal(torch.as_tensor(msg["value"]), rows):
            found = "rows of its own"  # a replayed model has the rows of the guide
        if found:
            raise SiteError(
                f"Plate '{self.plate}' has {found}, which does not fit "
                f"batch_size={self.batch_size}. Give it subsample_size={self.batch_size} or none, "
                "and use the indices that it yields. An automatic guide has the plate sizes of "
                "its first run, unless you pass create_plates."
            )
        msg["value"] = rows
        msg["done"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] != self.plate:
            super()._pyro_post_sample(msg)
