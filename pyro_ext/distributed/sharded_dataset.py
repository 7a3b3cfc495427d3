"""Divides the items of a stream among processes and workers."""

from collections.abc import Iterable, Iterator
from itertools import islice
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pyro_ext._arguments import check_integer, describe
from pyro_ext.distributed.processes import current_processes

T_co = TypeVar("T_co", covariant=True)


class ShardedDataset(IterableDataset[T_co]):
    """The items of an iterable data set that belong to this process and worker.

    With P processes and W workers of each ``DataLoader``, each of the P W readers has a part of the
    items. Item i belongs to part i mod P W. The processes are those of the default group of
    ``torch.distributed`` when you iterate. Without a group, the items are divided among workers.

    Every reader runs through the whole data set and keeps its part, so the data set must give the
    same items in the same order to all of them. Shuffle by the epoch, for example, and not by
    random numbers of the worker. The data set must not divide its items itself, as streams of
    Hugging Face and WebDataset do.

    If the number of items is not a multiple of P W, some processes have more items, and perhaps
    more minibatches. :class:`~pyro_ext.infer.EagerSVI` and :class:`~pyro_ext.infer.CompiledSVI`
    then weight each process by its rows. In a loop of your own, stop all processes at the same
    step.

    :param dataset: the data set: an iterable that starts anew in each epoch. Pass a data set with
        items by index to the ``DataLoader``, with a ``DistributedSampler``.
    :raises TypeError: if ``dataset`` is a ``ShardedDataset``, is not iterable, is an iterator, or
        has a length and items by index.

    >>> from itertools import islice
    >>> from torch.utils.data import DataLoader, IterableDataset
    >>> class Rows(IterableDataset):
    ...     epoch = 0
    ...     def set_epoch(self, epoch):
    ...         self.epoch = epoch
    ...     def __iter__(self):
    ...         generator = torch.Generator().manual_seed(self.epoch)
    ...         return iter(torch.randn(100, 3, generator=generator))
    >>> dataset = ShardedDataset(Rows())
    >>> loader = DataLoader(dataset, batch_size=16)
    >>> for epoch in range(2):
    ...     dataset.set_epoch(epoch)
    ...     for x in islice(loader, 6):  # as many steps in all processes
    ...         pass
    >>> x.shape
    torch.Size([16, 3])
    """

    def __init__(self, dataset: Iterable[T_co]) -> None:
        if isinstance(dataset, ShardedDataset):
            raise TypeError("ShardedDataset: dataset is a ShardedDataset. Pass the data set in it.")
        if not isinstance(dataset, Iterable):
            raise TypeError(
                f"ShardedDataset: dataset must be iterable, but it is {describe(dataset)}."
            )
        if not isinstance(dataset, IterableDataset):  # which inherits __getitem__
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
                raise TypeError(
                    "ShardedDataset: dataset has a length and items by index. Pass it to the "
                    "DataLoader, with sampler=DistributedSampler(dataset)."
                )
            if isinstance(dataset, Iterator):
                raise TypeError(
                    "ShardedDataset: dataset is an iterator, which gives its items only once. Pass "
                    "an object whose __iter__ returns a new iterator."
                )
        self.dataset = dataset
        # Persistent workers see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._rank_and_size = 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. At its start, it is passed on to ``dataset.set_epoch``, if that exists.

        :param epoch: the number of the epoch, >= 0.
        :raises TypeError: if ``epoch`` is not an integer.
        :raises ValueError: if ``epoch`` is negative.
        """
        check_integer("ShardedDataset", "epoch", epoch, 0)
        self._epoch.fill_(epoch)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is not forked does not know the group.
        is_for_worker = get_spawning_popen() is not None
        own = {"_rank_and_size": self._current_rank_and_size()} if is_for_worker else {}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # the memory of a copy is its own

    def __iter__(self) -> Iterator[T_co]:
        rank, size = self._current_rank_and_size()
        worker = get_worker_info()
        index, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(self._epoch))
        return islice(self.dataset, rank * num_workers + index, None, size * num_workers)

    def _current_rank_and_size(self) -> tuple[int, int]:
        processes = current_processes()
        return self._rank_and_size if processes is None else (processes.rank, processes.size)
