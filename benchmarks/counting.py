"""Counts what a program sends to a device, and where the host waits for it."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import Step

aten = torch.ops.aten
COPIES = aten._to_copy.default, aten.copy_.default
INDEXING = aten.index.Tensor, aten.index_put.default, aten.index_put_.default
#: The result, or its shape, depends on the values of tensors.
NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
WITHOUT_KERNEL = "empty", "detach_"


class CountingMode(TorchDispatchMode):
    """Counts operations, and host synchronisations, by the name of the operator.

    Views, and tensors without values, are no operations. The host waits where a value or a shape
    depends on values of the device, and in a blocking copy between host and device. On a CPU, all
    tensors count as those of the device, and no copies are seen.

    :param torch.device device: the device of the program.
    :ivar operations: the counts of operations.
    :ivar syncs: the counts of host synchronisations.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs and counts an operator."""
        kwargs = kwargs or {}
        with self:  # inference mode leaves composite operators whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        kinds = {x.device.type for x in leaves if isinstance(x, Tensor)}
        if self.device.type in kinds:
            if waits(func, args, kwargs, kinds):
                self.syncs[str(func)] += 1
            elif not func.is_view and not any(word in str(func) for word in WITHOUT_KERNEL):
                self.operations[str(func)] += 1
        return result


def waits(func: Any, args: Any, kwargs: dict[str, Any], kinds: set[str]) -> bool:
    """Whether the host waits in an operator, whose tensors are on these kinds of devices."""
    if func in COPIES:
        is_blocking = not (kwargs.get("non_blocking") or True in args[2:])
        return is_blocking and len(kinds) > 1
    if func in INDEXING:
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return not NEEDS_VALUES.isdisjoint(func.tags) or func is aten._linalg_check_errors.default


@contextmanager
def cuda_syncs() -> Iterator[list[warnings.WarningMessage]]:
    """The host synchronisations in a block, as CUDA reports them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        syncs: list[warnings.WarningMessage] = []
        try:
            yield syncs
        finally:
            torch.cuda.set_sync_debug_mode(before)
            syncs += [w for w in found if "synchronizing CUDA operation" in str(w.message)]


def launched_kernels(step: Step) -> int:
    """The number of kernels, copies and fills that a step launches on CUDA."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    events = profiler.events() or ()
    return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in events)
