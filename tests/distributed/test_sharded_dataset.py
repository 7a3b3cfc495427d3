"""The parts of a stream of data come to all processes and workers exactly once."""

import itertools
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from pyro_ext.distributed import ShardedDataset

LENGTHS = [0, 1, 7, 8, 23]


class Stream(IterableDataset):
    """Whole numbers, shifted by the epoch. As a map-style data set has, it has a length."""

    def __init__(self, length):
        self.length = length
        self.epoch = 0

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return (i + 100 * self.epoch for i in range(self.length))


def loader_of(dataset, num_workers, context=None):
    if num_workers == 0:
        return DataLoader(dataset, 2)
    options = {"multiprocessing_context": context, "persistent_workers": True}
    return DataLoader(dataset, 2, num_workers=num_workers, **options)


def read(length, num_workers, context=None):
    """The items of this process in two epochs."""
    return read_epochs(ShardedDataset(Stream(length)), num_workers, context)


def read_epochs(dataset, num_workers, context=None):
    loader = loader_of(dataset, num_workers, context)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([torch.empty(0, dtype=torch.int64), *loader]).tolist())
    return epochs


def assert_exactly_once(length, found):
    for epoch, parts in enumerate(zip(*found, strict=True)):
        assert sorted(itertools.chain(*parts)) == [i + 100 * epoch for i in range(length)]
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_item_comes_once_in_one_process(length, num_workers):
    assert_exactly_once(length, [read(length, num_workers)])


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_item_comes_once_in_two_processes(pools, length, num_workers):
    assert_exactly_once(length, pools(2).results(read, length, num_workers, "fork"))


@pytest.mark.long
@pytest.mark.slow
def test_workers_that_do_not_know_the_group_know_their_rank(pools):
    assert_exactly_once(7, pools(2).results(read, 7, 2, "spawn"))


def dumps():
    return pickle.dumps(ShardedDataset(Stream(7)))


@pytest.mark.long
def test_a_pickle_of_a_rank_holds_all_items(pools):
    for text in pools(2).results(dumps):
        for num_workers in (0, 2):
            assert_exactly_once(7, [read_epochs(pickle.loads(text), num_workers)])


def test_the_items_are_taken_in_turn():
    dataset = ShardedDataset(Stream(8))
    assert torch.cat([*loader_of(dataset, 2)]).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_an_epoch_needs_no_set_epoch_of_the_data_set():
    dataset = ShardedDataset({0, 1, 2})
    dataset.set_epoch(3)
    assert list(dataset) == [0, 1, 2]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (ShardedDataset({1}), "dataset is a ShardedDataset. Pass the data set in it"),
        (3, "dataset must be iterable, but it is 3"),
        ([1, 2], "dataset has a length and items by index. Pass it to the DataLoader, with"),
        (iter({1}), "dataset is an iterator, which gives its items only once"),
    ],
)
def test_errors(dataset, message):
    with pytest.raises(TypeError, match=f"ShardedDataset: {message}"):
        ShardedDataset(dataset)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_an_epoch_is_a_whole_number(epoch, error):
    with pytest.raises(error, match="ShardedDataset: epoch must be"):
        ShardedDataset({1}).set_epoch(epoch)
