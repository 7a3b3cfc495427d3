"""Short summaries of arguments and parameters, to compare them between processes."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_ext._digest import digest
from pyro_ext._private.of_torch import pytree

#: The number of entries that stand for a large tensor.
_MAX_ENTRIES = 2**18


def named_arguments(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model by their descriptions, such as ``"argument 'x'"``."""
    program = poutine.unwrap(model)
    names: list[str] = []
    try:
        call = program.forward if isinstance(program, nn.Module) else program
        parameters = inspect.signature(call).parameters.values()
        names = [p.name for p in parameters if p.kind < p.VAR_POSITIONAL]
    except (TypeError, ValueError):  # a callable without a signature
        pass
    names += map(str, range(len(names), len(args)))
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return {f"argument '{name}'": value for name, value in named.items()}


def parameters(*programs: Any) -> dict[str, Any]:
    """Return the param store, and the states of programs that are modules, by descriptions."""
    store: Any = pyro.get_param_store()
    values = {f"parameter '{name}'": x for name, x in store.items()}
    for module in map(poutine.unwrap, programs):
        if isinstance(module, nn.Module):
            for name, x in module.state_dict().items():
                values[f"entry '{name}' of {type(module).__name__}"] = x
    return values


def summary(value: Any) -> str:
    """Return a digest of a value. Large tensors and arrays count by a part of their entries."""
    return digest(pytree.tree_map(_some_entries, value))


def _some_entries(x: Any) -> Any:
    if isinstance(x, Tensor):
        is_large = x.layout == torch.strided and x.numel() > _MAX_ENTRIES
    else:
        is_large = isinstance(x, np.ndarray) and x.size > _MAX_ENTRIES
    if not is_large:
        return x
    flat = x.reshape(-1)
    # An odd step meets all columns of a matrix with an even number of them.
    return tuple(x.shape), flat[:: len(flat) // _MAX_ENTRIES | 1]
