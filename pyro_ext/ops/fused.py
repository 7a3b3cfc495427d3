"""Functions of blocks of numbers that a compiler fuses into one kernel."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext._private.of_torch import dispatch_modes, inductor, is_forked

Run = Callable[..., Sequence[Tensor]]


class _State:
    """The setting of this process."""

    is_enabled = False


def use_fused_kernels(enabled: bool = True) -> None:
    """Compile the likelihoods of this package to fused kernels, for large tensors on a CPU.

    The kernels are for ``log_prob`` and its gradient of :class:`NormalScaleMixture` with fixed
    components, and of :class:`DiscretizedLogisticMixture` and its relatives. The first large
    evaluation with another number of components or dtype compiles a kernel. That takes seconds and
    needs a C++ compiler. Results differ by rounding from those without kernels. The kernels are off
    by default, because a short program does not repay them.

    If no kernel can be compiled, the usual code gives the results, with one warning. The same holds
    in a process that was forked after a kernel was compiled. :class:`CompiledSVI` compiles whole
    steps, and ignores this setting.

    :param enabled: whether to use kernels from now on, in all threads of this process.

    >>> use_fused_kernels()
    >>> use_fused_kernels(False)
    """
    _State.is_enabled = enabled


class Fused:
    """A function of tensors with kernels: one for each combination of shapes and dtypes.

    :param function: a function of contiguous tensors that does not change them.
    """

    def __init__(self, function: Run) -> None:
        self.function = function
        self._kernels: dict[Any, Run] = {}

    def in_blocks(self, length: int, size: int, **options: Any) -> Iterator[tuple[slice, Run]]:
        """Return blocks of a range, with the function to call for each block.

        All blocks of a kernel have the same size, so the last two may overlap.

        :param length: the length of the range.
        :param size: the size of a block.
        :param options: keyword arguments of the function, which are no tensors.
        """
        function = partial(self.function, **options)
        if not _State.is_enabled or length < size or dispatch_modes():
            return ((slice(i, i + size), function) for i in range(0, length, size))
        starts = (min(i, length - size) for i in range(0, length, size))
        run = partial(self._run, function)
        return ((slice(i, i + size), run) for i in starts)

    def _run(self, function: partial[Sequence[Tensor]], *inputs: Tensor) -> Sequence[Tensor]:
        if not _State.is_enabled:  # since the block before
            return function(*inputs)
        if is_forked():
            _give_up("this process was forked after a compilation")
            return function(*inputs)
        # The number of threads is a part of a kernel.
        of_inputs = ((x.shape, x.dtype) for x in inputs)
        key = torch.get_num_threads(), *function.keywords.values(), *of_inputs
        kernel = self._kernels.get(key)
        if kernel is not None:
            return kernel(*inputs)
        try:
            kernel = _compile(function, inputs)
            found = kernel(*inputs)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            _give_up(f"the compiler fails ({lines[0]})")
            return function(*inputs)
        self._kernels[key] = kernel
        return found


def _compile(function: Run, inputs: Sequence[Tensor]) -> Run:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's warnings about itself
        graph = make_fx(function)(*inputs)
        return inductor().compile_fx(graph, list(inputs))


def _give_up(reason: str) -> None:
    _State.is_enabled = False
    warnings.warn(
        f"pyro_ext uses no fused kernels from now on: {reason}. Results are right, but take longer "
        "to compute. Call use_fused_kernels(False) to hide this warning.",
        stacklevel=2,
    )
