import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def kept_buffers() -> Iterator[None]:
    """Restore the buffers of the modules that are called in a block, such as running statistics."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}

    def save(module: nn.Module, inputs: Any) -> None:
        for buffer in module.buffers(recurse=False):
            saved.setdefault(id(buffer), (buffer, buffer.clone()))

    hook = register_module_forward_pre_hook(save)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # of a hook in its modules
            yield
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, value in saved.values():
                if not torch.equal(buffer, value):  # .data: graphs may hold the buffer
                    buffer.data.copy_(value)
