"""The states of all generators of random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pyro_ext.ops.random_state import get_random_state, set_random_state


def random_states(data: Any = None) -> dict[str, Any]:
    """The states of the generators of torch, Python and NumPy, and of a ``DataLoader``'s own."""
    return {
        "torch": get_random_state(),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "data": [generator.get_state() for generator in _generators(data)],
    }


def set_random_states(states: dict[str, Any], data: Any = None) -> None:
    """Restores what :func:`random_states` returned."""
    set_random_state(states["torch"])
    random.setstate(states["random"])
    np.random.set_state(states["numpy"])
    for generator, state in zip(_generators(data), states["data"], strict=False):
        generator.set_state(state)


def _generators(data: Any) -> list[torch.Generator]:
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[-1], "sampler", None))
    found = [getattr(owner, "generator", None) for owner in (data, *samplers)]
    unique = {id(x): x for x in found if isinstance(x, torch.Generator)}
    return list(unique.values())


@contextmanager
def other_random_numbers(seed: int) -> Iterator[None]:
    """Seeds every generator, and restores their states at the end."""
    states = random_states()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        set_random_states(states)
