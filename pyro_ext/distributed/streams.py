"""Streams of random numbers: one of each process, and one that all processes share."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_ext._random_states import kept_random_states
from pyro_ext.distributed.processes import Processes


def agreed_seed(processes: Processes) -> int:
    """Return a seed that rank 0 draws from torch's generator. All processes draw it."""
    seed = torch.randint(2**62, ())
    processes.copy_from_first(seed)
    return int(seed)


def seed_of(seed: int, stream: str | int) -> int:
    """Return the seed of one of the streams that belong to a seed.

    :param seed: the seed of all streams.
    :param stream: the rank of a process, or another name.
    """
    digest = hashlib.sha256(f"{seed} {stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def own_random_numbers(processes: Processes | None) -> Iterator[None]:
    """Give each process other random numbers in a block, all from one number of rank 0.

    After the block, the generators continue from where they were.

    :param processes: the processes. Without them, nothing changes.
    """
    if processes is None:
        yield
        return
    seed = agreed_seed(processes)
    with kept_random_states(seed_of(seed, processes.rank)):
        yield
