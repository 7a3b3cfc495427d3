"""The states of the random number generators of torch, Python, NumPy and a ``DataLoader``."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

RandomStates = dict[str, Any]

_MAX_DEPTH = 4
_WITHOUT = (torch.Tensor, torch.nn.Module, type, ModuleType)  # hold no generator of a loader


def random_states(data: Any = None) -> RandomStates:
    """Return the states of all random number generators.

    They belong to torch, Python, NumPy and, if given, a ``DataLoader``. States of CUDA generators
    are included once CUDA is in use.

    :param data: a ``DataLoader``, or None.
    """
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "data": [_read(generator) for generator in generators_of(data)],
    }


def set_random_states(states: RandomStates, data: Any = None) -> None:
    """Restore the states that :func:`random_states` returned.

    :param states: the states, also after a file has held them.
    :param data: the ``DataLoader`` that was passed to :func:`random_states`, or None.
    """
    torch.set_rng_state(states["cpu"])
    if states["cuda"]:
        for device, state in zip(range(torch.cuda.device_count()), states["cuda"], strict=False):
            torch.cuda.set_rng_state(state, device)
    random.setstate(_as_python(states["random"]))
    np.random.set_state(_as_numpy(states["numpy"]))
    for generator, state in zip(generators_of(data), states["data"], strict=False):
        _write(generator, state)


@contextmanager
def kept_random_states(seed: int | None = None, data: Any = None) -> Iterator[None]:
    """Restore all random states at the end of a block, also after an exception.

    :param seed: the seed of every global generator inside the block; None to start from the
        current states.
    :param data: a ``DataLoader`` whose own generators are restored, too, or None.
    """
    states = random_states(data)
    try:
        if seed is not None:
            seed_generators(seed)
        yield
    finally:
        set_random_states(states, data)


def seed_generators(seed: int) -> None:
    """Seed all global generators with a number of 32 bits, which is what NumPy takes."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def compact_random_states(states: RandomStates) -> RandomStates:
    """Return states for a file, with a tensor in place of the long tuple of Python's generator.

    :param states: the states, also if they are compact already.
    """
    version, words, gauss = states["random"]
    return {**states, "random": (version, torch.as_tensor(words, dtype=torch.int64), gauss)}


def _as_python(state: Any) -> Any:
    """Return a state of Python's generator, from the state or from its compact form."""
    version, words, gauss = state
    return version, tuple(words.tolist()) if isinstance(words, torch.Tensor) else words, gauss


def _as_numpy(state: Any) -> Any:
    """Return a state of NumPy with its keys as an array. In a file, they are a tensor."""
    if isinstance(state, dict):
        return state
    return tuple(x.numpy() if isinstance(x, torch.Tensor) else x for x in state)


def generators_of(data: Any) -> list[torch.Generator | np.random.Generator]:
    """Return the generators that a ``DataLoader``, its parts and wrappers around it own."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending = [(data, 0)]
    for value, depth in pending:  # the loop also visits what it appends
        if isinstance(value, (torch.Generator, np.random.Generator)):
            found[id(value)] = value
        elif depth <= _MAX_DEPTH and id(value) not in seen and not isinstance(value, _WITHOUT):
            seen.add(id(value))
            pending += [(x, depth + 1) for x in getattr(value, "__dict__", {}).values()]
    return list(found.values())


def _read(generator: Any) -> Any:
    is_of_torch = isinstance(generator, torch.Generator)
    return generator.get_state() if is_of_torch else generator.bit_generator.state


def _write(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.bit_generator.state = _as_arrays(state)


def _as_arrays(state: Any) -> Any:
    """Return a state of a generator with arrays again. In a file, they are tensors."""
    if isinstance(state, dict):
        return {key: _as_arrays(x) for key, x in state.items()}
    return state.numpy() if isinstance(state, torch.Tensor) else state
