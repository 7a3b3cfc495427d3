"""Backends, which compile captured graphs."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_ext._private.of_torch import (
    inductor,
    inductor_with_cache,
    inductor_with_checks,
    inductor_with_random_operators,
)
from pyro_ext.infer.svi.capture.matrix_products import with_faster_products

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Backend(NamedTuple):
    """The settings for compiling graphs.

    :param name: ``"inductor"``, or ``"eager"`` to run graphs without compiling them.
    :param mode: a mode of ``torch.compile``, for Inductor.
    """

    name: str
    mode: str

    @property
    def reuses_memory(self) -> bool:
        """Whether a run on a GPU overwrites the outputs of the run before."""
        return self.name == "inductor" and self.mode in ("reduce-overhead", "max-autotune")


class Compiled(NamedTuple):
    """A compiled graph.

    :ivar run: a function that gives the results of the graph.
    :ivar num_kernels: the number of kernels that the compiler generated.
    """

    run: Callable[..., Sequence[Tensor | None]]
    num_kernels: int


class CompileError(Exception):
    """An error in compiling a graph. The message is the reason, as part of a sentence."""


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor], backend: Backend) -> Compiled:
    """Compile a graph.

    :raises CompileError: if the backend fails.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's warnings about itself
        try:
            return _compile_by_inductor(graph, inputs, backend.mode)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CompileError(
                f"{backend.name} could not compile the graph ({lines[0]})"
            ) from error


def _compile_by_inductor(graph: GraphModule, inputs: Sequence[Tensor], mode: str) -> Compiled:
    compiler = inductor()
    # The eager generator gives the same random numbers as a step of Pyro, and is faster. To save
    # memory, some versions of the compiler put random operations into another order.
    options = {"fallback_random": True, "reorder_for_peak_memory": False}
    options = {key: value for key, value in options.items() if hasattr(compiler.config, key)}
    options = {**compiler.list_mode_options(mode), **options}
    with (
        compiler.config.patch(options),
        inductor_with_checks(),
        inductor_with_random_operators(),
        inductor_with_cache(),
        _deterministic_algorithms(inputs),
    ):
        num_before = compiler.metrics.generated_kernel_count
        run = compiler.compile_fx(with_faster_products(graph, inputs), list(inputs))
        return Compiled(run, compiler.metrics.generated_kernel_count - num_before)


@contextmanager
def _deterministic_algorithms(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Compile sums over indices as calls of torch, because kernels for CPUs write out of bounds.

    See pytorch#191837.
    """
    mode = torch.get_deterministic_debug_mode()
    try:
        if not any(x.is_cuda for x in inputs):
            torch.set_deterministic_debug_mode("warn")
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
