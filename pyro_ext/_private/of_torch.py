"""Private names of torch. This module imports only torch."""

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn
from torch._C import DisableTorchFunction
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.distributions.transforms import _InverseTransform as InverseTransform
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
)
from torch.utils.data import DataLoader

__all__ = [
    "PACK_SEQUENCE",
    "DisableTorchFunction",
    "Inductor",
    "InverseTransform",
    "Recorder",
    "TorchDispatchMode",
    "buffers_of",
    "children_of",
    "default_store",
    "dispatch_modes",
    "gathered",
    "global_hooks",
    "has_gradient_hooks",
    "hooks_of",
    "inductor",
    "inductor_with_cache",
    "inductor_with_checks",
    "inductor_with_random_operators",
    "is_check",
    "is_forked",
    "is_fully_sharded",
    "is_in_transform",
    "is_nccl",
    "is_random",
    "is_sharded",
    "mark_as_stepped",
    "onednn_linear",
    "outside_of_dynamo",
    "parameters_of",
    "pytree",
    "schema_of",
    "set_fake_values",
    "storage_of",
    "with_batches",
    "without_gradient_hooks",
]

#: The operator of ``pack_padded_sequence``.
PACK_SEQUENCE = torch.ops.aten._pack_padded_sequence.default


def is_in_transform(x: Tensor) -> bool:
    """Return whether a tensor belongs to a ``torch.func`` transform or to batched gradients."""
    return is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x)


class Recorder(TorchDispatchMode):
    """A base class of modes that record operations for a compiler."""


def dispatch_modes() -> list[TorchDispatchMode]:
    """Return the modes that see each operation, such as those of ``make_fx``."""
    return _get_current_dispatch_mode_stack()


def default_store() -> Any:
    """Return the store through which the processes of the default group have met."""
    return distributed.distributed_c10d._get_default_store()


def is_nccl() -> bool:
    """Return whether the default group sends tensors on GPUs only."""
    return distributed.get_backend() == "nccl"


def is_sharded(x: Tensor) -> bool:
    """Return whether a tensor is a ``DTensor``, of which each process holds a part."""
    return _has_imported_type(x, "torch.distributed.tensor", "DTensor")


def is_fully_sharded(module: Any) -> bool:
    """Return whether ``fully_shard`` has wrapped a module."""
    return _has_imported_type(module, "torch.distributed.fsdp", "FSDPModule")


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Gather the parameters of a module in a block, if ``fully_shard`` has wrapped it."""
    if not is_fully_sharded(module):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _has_imported_type(value: Any, module: str, name: str) -> bool:
    """Return whether a value has a type whose import takes long and may not have happened."""
    imported = sys.modules.get(module)
    return imported is not None and isinstance(value, getattr(imported, name, ()))


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the parameters that a module owns directly."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the buffers that a module owns directly."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, Any]:
    """Return the direct submodules of a module."""
    return module._modules


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """Return the hooks of a module, in dicts that the module changes in place."""
    return [
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    ]


def global_hooks() -> tuple[Any, ...]:
    """Return the hooks that run in every module."""
    module = torch.nn.modules.module
    return (
        *module._global_forward_pre_hooks.values(),
        *module._global_forward_hooks.values(),
        *module._global_backward_pre_hooks.values(),
        *module._global_backward_hooks.values(),
    )


def has_gradient_hooks(x: Tensor) -> bool:
    """Return whether a hook runs when a tensor receives its gradient."""
    return bool(x._backward_hooks or x._post_accumulate_grad_hooks)


@contextmanager
def without_gradient_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Turn off the hooks that run before a tensor receives its gradient, in a block."""
    hooks = [(x, x._backward_hooks) for x in tensors if x._backward_hooks]
    try:
        for x, _ in hooks:
            x._backward_hooks = None
        yield
    finally:
        for x, of_x in hooks:
            x._backward_hooks = of_x


def storage_of(x: Tensor) -> int:
    """Return a number that identifies the memory of a tensor; views return the same number."""
    return x.untyped_storage()._cdata if x.layout == torch.strided else id(x)


def schema_of(operator: Any) -> Any:
    """Return the signature of an operator, with the arguments that it reads and writes."""
    return operator._schema


def is_random(operator: Any) -> bool:
    """Return whether an operator draws from a random generator of torch."""
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())


def is_check(operator: Any) -> bool:
    """Return whether an operator can only raise an error, such as the check after Cholesky."""
    schema = getattr(operator, "_schema", None)
    return schema is not None and not (schema.returns or schema.is_mutable)


def with_batches(loader: DataLoader[Any], batches: Any) -> DataLoader[Any]:
    """Return a loader with the same settings, and with other batches.

    :param loader: a loader of a map-style data set.
    :param batches: its new batch sampler, or sampler if it has no batch sampler.
    """
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    found = copy.copy(loader)
    # A loader refuses to set its sampler. Workers that persist have the batches of their loader.
    vars(found).update({name: batches, "_iterator": None})
    return found


def mark_as_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Mark an optimiser as stepped, for learning-rate schedulers."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def outside_of_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that ``torch.compile`` must run as it is.

    ``torch.compiler.disable`` would import Dynamo at once, which takes a second.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    return call


class Inductor(NamedTuple):
    """The compiler behind ``torch.compile``."""

    config: Any
    metrics: Any
    list_mode_options: Any
    compile_fx: Any


_process_with_kernels: list[int] = []


def is_forked() -> bool:
    """Return whether this process was forked from one that has used the compiler.

    Kernels of the compiler wait forever for threads, which do not exist in a fork.
    """
    return bool(_process_with_kernels) and _process_with_kernels[0] != os.getpid()


def inductor() -> Inductor:
    """Return the compiler behind ``torch.compile``.

    The import takes seconds, so this function imports the compiler when it is needed.

    :raises RuntimeError: in a process that was forked from one that has used the compiler.
    """
    if is_forked():
        raise RuntimeError("this process was forked after a compilation")
    _process_with_kernels[:] = [os.getpid()]
    from torch._inductor import config, list_mode_options, metrics
    from torch._inductor.compile_fx import compile_fx

    return Inductor(config, metrics, list_mode_options, compile_fx)


def set_fake_values(graph: GraphModule, inputs: Sequence[Tensor]) -> None:
    """Set ``meta["val"]`` of each node of a graph to a tensor without memory."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


@functools.cache
def onednn_linear() -> Any:
    """Return an operator ``(x, weight, bias)`` of oneDNN for ``x @ weight.T + bias``.

    It hides the operator of torch, which Inductor accepts with constant weights only.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product

    def like_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(len(x), len(weight))

    schema = torch.library.infer_schema(linear, mutates_args=())
    torch.library.define("pyro_ext::linear", schema)
    torch.library.impl("pyro_ext::linear", "cpu", linear)
    torch.library.register_fake("pyro_ext::linear", like_product)
    return torch.ops.pyro_ext.linear.default


@contextmanager
def inductor_with_checks() -> Iterator[None]:
    """Let Inductor keep checks in a block. Torch 2.6 removes them, because nothing uses them."""
    from torch._inductor.ir import FallbackKernel

    has_side_effects = FallbackKernel.has_side_effects

    def is_kept(self: Any) -> bool:
        return has_side_effects(self) or is_check(self.op_overload)

    with patch.object(FallbackKernel, "has_side_effects", is_kept):
        yield


@contextmanager
def inductor_with_cache() -> Iterator[None]:
    """Let Inductor keep its results on disk in a block, which it does in a tracing context only."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv(assume_static_by_default=True)
    with tracing(TracingContext(FakeTensorMode(shape_env=shapes))):
        yield


@contextmanager
def inductor_with_random_operators() -> Iterator[None]:
    """Let Inductor keep all random operators of torch as they are, in a block.

    The results are not kept on disk if a table of decompositions is passed instead.
    """
    from torch._inductor.decomposition import decompositions

    with patch.dict(decompositions):
        for operator in [operator for operator in decompositions if is_random(operator)]:
            del decompositions[operator]
        yield
