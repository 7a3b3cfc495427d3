"""Data loaders of processes that have a share of the rows each."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
)

from pyro_ext._private.of_torch import with_batches
from pyro_ext.distributed.processes import Processes


class UnpaddedSampler(DistributedSampler[Any]):
    """A ``DistributedSampler`` that repeats no row. Some processes have one row more than others.

    The arguments are those of ``DistributedSampler``.
    """

    def __len__(self) -> int:
        dataset: Any = self.dataset
        return len(range(self.rank, len(dataset), self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), len(self))


def with_share_of_rows(owner: str, data: Any, processes: Processes, seed: int) -> Any:
    """Return data whose minibatches hold the rows of this process.

    A plain ``DataLoader`` gets a ``DistributedSampler`` that repeats no row. Data of another kind
    stay as they are.

    :param owner: the name of the caller, for messages.
    :param data: a loader, or other data.
    :param processes: the processes.
    :param seed: the seed of the order of the rows.
    :raises ValueError: if the loader has a ``DistributedSampler`` for another process.
    """
    if not isinstance(data, DataLoader):
        return data
    sampler = sampler_of(data)
    if isinstance(sampler, DistributedSampler):
        found, here = (sampler.rank, sampler.num_replicas), (processes.rank, processes.size)
        if found != here:
            raise ValueError(
                f"{owner}: the DistributedSampler of data is for rank {found[0]} of {found[1]}, "
                f"but this process has rank {here[0]} of {here[1]}. Make it after "
                "init_process_group, without rank= and num_replicas=."
            )
        return data
    dataset: Any = data.dataset
    batches = data.batch_sampler
    is_shuffled = type(sampler) is RandomSampler and not sampler.replacement
    if not (is_shuffled or type(sampler) is SequentialSampler) or type(batches) is not BatchSampler:
        return data
    if sampler.data_source is not dataset or len(sampler) != len(dataset):
        return data  # the sampler chooses rows
    kind: type[DistributedSampler[Any]] = (
        DistributedSampler if batches.drop_last else UnpaddedSampler
    )
    own = kind(
        dataset,
        processes.size,
        processes.rank,
        shuffle=is_shuffled,
        seed=seed,
        drop_last=batches.drop_last,
    )
    return with_batches(data, BatchSampler(own, batches.batch_size, batches.drop_last))


def sampler_of(loader: "DataLoader[Any]") -> Any:
    """Return the sampler of a loader, also if it is inside of a batch sampler."""
    return getattr(loader.batch_sampler, "sampler", loader.sampler)


def set_epoch(data: Any, epoch: int) -> None:
    """Tell the sampler or the data set of a loader the number of the epoch, if it wants to know.

    :param data: a loader, or other data.
    :param epoch: the number of the epoch, from 0.
    """
    if isinstance(data, DataLoader):
        for part in (sampler_of(data), data.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
