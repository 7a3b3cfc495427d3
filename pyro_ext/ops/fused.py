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

    The kernels are for ``log_prob`` and its gradient, of
    :class:`~pyro_ext.distributions.NormalScaleMixture` with fixed components, and of
    :class:`~pyro_ext.distributions.DiscretizedLogisticMixture` and its relatives. The first large
    evaluation with another number of components or dtype compiles a kernel. That takes seconds and
    needs a C++ compiler. Results differ by rounding from those without kernels. The kernels are off
    by default, because a short program does not repay them.

    If no kernel can be compiled, the usual code gives the results, with one warning. The same holds
    in a process that was forked after a kernel was compiled.
    :class:`~pyro_ext.infer.CompiledSVI` compiles whole steps, and ignores this setting.

    :param enabled: whether to use kernels from now on, in all threads of this process.

    >>> use_fused_kernels()
    >>> use_fused_kernels(False)
    """
    _State.is_enabled = enabled


class Fused:
    """A function of tensors with kernels: one for each combination of shapes and dtypes.

    :param function: a function that returns tensors. It does not change its inputs, which are
        contiguous.
    :param usual: a function to use without kernels. It may change its inputs, and writes its
        results to its keyword argument ``out``. By default, it is ``function`` and a copy.
    """

    def __init__(self, function: Run, usual: Callable[..., object] | None = None) -> None:
        self.function = function
        self.usual = partial(_copied, function) if usual is None else usual
        self._kernels: dict[Any, Run] = {}

    def in_blocks(
        self, length: int, size: int, **options: Any
    ) -> Iterator[tuple[slice, Callable[..., object]]]:
        """Return blocks of a range, with the function to call for each block.

        The function takes tensors, and writes its results to its keyword argument ``out``. All
        blocks of a kernel have the same size, so the last two may overlap.

        :param length: the length of the range.
        :param size: the size of a block.
        :param options: keyword arguments of the function, which are no tensors.
        """
        if not _State.is_enabled or length < size or dispatch_modes():
            usual = partial(self.usual, **options)
            return ((slice(i, i + size), usual) for i in range(0, length, size))
        starts = (min(i, length - size) for i in range(0, length, size))
        run = partial(self._run, options)
        return ((slice(i, i + size), run) for i in starts)

    def _run(self, options: dict[str, Any], *inputs: Tensor, out: Sequence[Tensor]) -> None:
        # The number of threads is a part of a kernel.
        of_inputs = ((x.shape, x.dtype) for x in inputs)
        key = torch.get_num_threads(), *options.values(), *of_inputs
        if _State.is_enabled and is_forked():
            _give_up("this process was forked after a compilation")
        elif _State.is_enabled and key not in self._kernels:
            try:
                kernel = _compile(partial(self.function, **options), inputs)
                kernel(*inputs)
                self._kernels[key] = kernel
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                _give_up(f"the compiler fails ({lines[0]})")
        if _State.is_enabled:
            _copied(self._kernels[key], *inputs, out=out)
        else:
            self.usual(*inputs, out=out, **options)


def _copied(run: Run, *inputs: Tensor, out: Sequence[Tensor], **options: Any) -> None:
    for x, to in zip(run(*inputs, **options), out, strict=False):
        to.copy_(x)


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
