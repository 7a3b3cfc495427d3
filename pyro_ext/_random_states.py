"""The states of all random number generators: of torch, Python, NumPy, and a ``DataLoader``."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomStates = dict[str, Any]


def random_states(data: Any = None) -> RandomStates:
    """The states of the generators of torch, Python and NumPy, and of a ``DataLoader``'s own.

    A CUDA generator is included once CUDA is in use.
    """
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "data": [generator.get_state() for generator in _generators(data)],
    }


def set_random_states(states: RandomStates, data: Any = None) -> None:
    """Restores what :func:`random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    for generator, state in zip(_generators(data), states["data"], strict=False):
        generator.set_state(state)


@contextmanager
def kept_random_states(seed: int | None = None) -> Iterator[None]:
    """Keeps all states, and restores them at the end, also after an exception.

    :param int seed: seeds every generator in between; None goes on from the states of now.
    """
    states = random_states()
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
        yield
    finally:
        set_random_states(states)


def _generators(data: Any) -> list[torch.Generator]:
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in (data, *samplers)]
    unique = {id(x): x for x in found if isinstance(x, torch.Generator)}
    return list(unique.values())
