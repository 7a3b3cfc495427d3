"""Seeds of the random numbers of several processes."""

import hashlib

import torch

from pyro_ext._random_states import seed_all
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


def seed_stream(seed: int, stream: str | int) -> None:
    """Seed all generators of this process for one of the streams that belong to a seed."""
    seed_all(seed_of(seed, stream))
