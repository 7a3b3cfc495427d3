"""The batches of a loader that belong to one of several processes."""

import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pyro_ext._private.of_torch import pytree, with_batches
from pyro_ext.distributed.joint_call import JointCall

_ADVICE = "Pass a loader over all rows, with the same settings and seed, on each rank."


class Batch(NamedTuple):
    """A batch of a loader.

    :ivar position: the number of earlier batches.
    :ivar rows_before: the number of rows in the batches of other processes just before this one, as
        far as it is known.
    :ivar content: what the loader yields.
    """

    position: int
    rows_before: int
    content: Any


def own_batches(call: JointCall, loader: Iterable[Any]) -> Iterator[Batch]:
    """Return the batches of this process, which has every P-th batch of a loader.

    A process loads only its own batches if the data set is map-style. Other iterables make all
    batches in each process.

    :param call: the call. All processes have the same random numbers so far.
    :param loader: the loader, over all rows.
    :raises ValueError: if the sampler of the loader divides the rows already, or if the processes
        have other batches.
    """
    if call.size == 1:
        return (Batch(index, 0, batch) for index, batch in enumerate(loader))
    samplers: list[Any] = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    samplers.append(getattr(samplers[1], "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, DistributedSampler):
            raise ValueError(
                f"{call.owner}: data_loader has a {type(sampler).__name__}, which repeats rows or "
                "leaves rows out so that each process has equally many. Pass a loader over all "
                f"rows on each rank, without this sampler. {call.owner} divides them."
            )
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _of_map_style(call, loader)
    return _without_others(call, loader)


def _of_map_style(call: JointCall, loader: DataLoader[Any]) -> Iterator[Batch]:
    has_batches = loader.batch_sampler is not None
    found: Any = loader.batch_sampler if has_batches else loader.sampler
    batches = list(found)
    rows = batches[0] if has_batches and batches else batches
    call.check_values(
        lambda: {
            "order of the batches of data_loader": repr(batches),
            "first row of data_loader": _row(loader.dataset, rows[0]) if rows else None,
        },
        _ADVICE,
    )
    sizes = [len(batch) if isinstance(batch, Sized) else 1 for batch in batches]
    own = with_batches(loader, batches[call.rank :: call.size])
    loaded = call.drawn(own, f"batches of rank {call.rank}")
    return (
        Batch(index, sum(sizes[index - call.rank : index]), content)
        for index, content in zip(range(call.rank, len(batches), call.size), loaded, strict=True)
    )


def _without_others(call: JointCall, loader: Iterable[Any]) -> Iterator[Batch]:
    batches = call.drawn(loader, "batches")
    first = list(itertools.islice(batches, 1))
    call.check_values(lambda: {"first batch of data_loader": first}, _ADVICE)
    return _every_other(call, itertools.chain(first, batches))


def _every_other(call: JointCall, batches: Iterable[Any]) -> Iterator[Batch]:
    rows_before = 0
    for index, content in enumerate(batches):
        if index % call.size == call.rank:
            yield Batch(index, rows_before, content)
        rows_before = 0 if (index + 1) % call.size == 0 else rows_before + _num_rows(content)


def _row(dataset: Any, index: Any) -> Any:
    several = getattr(dataset, "__getitems__", None)
    return several([index])[0] if several else dataset[index]


def _num_rows(batch: Any) -> int:
    """Return the length of the first array in a batch, for messages."""
    arrays = (x for x in pytree.tree_leaves(batch) if isinstance(x, (Tensor, np.ndarray)))
    first = next(arrays, None)
    return 0 if first is None or not first.ndim else len(first)
