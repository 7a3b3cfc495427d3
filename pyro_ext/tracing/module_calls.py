"""The modules that programs call, and their buffers."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def before_first_calls(look: Callable[[nn.Module], None]) -> Iterator[None]:
    """Call a function before the first call of each module in a block.

    :param look: the function of a module.
    """
    seen: dict[int, nn.Module] = {}  # with the module, whose id another one could get

    def see(module: nn.Module, inputs: Any) -> None:
        if id(module) not in seen:
            seen[id(module)] = module
            look(module)

    hook = register_module_forward_pre_hook(see)
    try:
        with warnings.catch_warnings():
            # The hook may also run inside of compiled modules, where it sees nothing new.
            warnings.filterwarnings("ignore", "Using `torch.compile")
            yield
    finally:
        hook.remove()


@contextmanager
def called_modules() -> Iterator[list[nn.Module]]:
    """Collect the modules that are called, in the order of their first calls."""
    modules: list[nn.Module] = []
    with before_first_calls(modules.append):
        yield modules


@contextmanager
def kept_buffers() -> Iterator[None]:
    """Restore the buffers of the modules that are called in a block, such as running statistics."""
    saved: list[tuple[Tensor, Tensor]] = []

    def save(module: nn.Module) -> None:
        saved.extend((buffer, buffer.clone()) for buffer in module.buffers(recurse=False))

    try:
        with before_first_calls(save):
            yield
    finally:
        for buffer, value in saved:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # .data: graphs may hold the buffer
