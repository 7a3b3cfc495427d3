"""Private names of torch. Imports torch alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.distributions.transforms import _InverseTransform as InverseTransform
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DisableTorchFunction",
    "Inductor",
    "InverseTransform",
    "TorchDispatchMode",
    "buffers_of",
    "children_of",
    "has_gradient_hooks",
    "inductor",
    "is_in_transform",
    "mark_as_stepped",
    "parameters_of",
    "pytree",
    "schema_of",
    "storage_of",
    "without_validation",
]


def is_in_transform(x: Tensor) -> bool:
    """Whether a tensor belongs to a transform of ``torch.func``, or to batched gradients."""
    return is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x)


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The parameters that a module holds itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The buffers that a module holds itself."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """The modules that a module holds itself."""
    return module._modules


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether a hook runs when a tensor receives its gradient."""
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


def storage_of(x: Tensor) -> int:
    """A number for the memory that a tensor shares with its views."""
    return x.untyped_storage()._cdata


def schema_of(operator: Any) -> Any:
    """The signature of an operator: what it reads and writes."""
    return operator._schema


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tells schedulers that an optimiser has been stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def without_validation() -> Any:
    """A patch under which no distribution validates its samples."""
    from unittest.mock import patch

    return patch.object(torch.distributions.Distribution, "_validate_sample", _accept)


def _accept(*args: Any, **kwargs: Any) -> None:
    pass


class Inductor(NamedTuple):
    """The compiler behind ``torch.compile``."""

    config: Any
    list_mode_options: Any
    compile_fx: Any
    select_decomp_table: Any


def inductor() -> Inductor:
    """The compiler, imported late: that takes seconds."""
    from torch._inductor import config, list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    return Inductor(config, list_mode_options, compile_fx, select_decomp_table)
