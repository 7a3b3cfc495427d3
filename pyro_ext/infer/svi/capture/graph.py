"""Captures the loss and gradients of a step as a graph, a function of tensors only."""

import itertools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from pyro import poutine
from pyro.infer.util import Dice
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_ext._private.of_pyro import COMMON_SCALE
from pyro_ext._private.of_torch import storage_of
from pyro_ext.infer.svi.capture.graph_inputs import params_kept_in_place, params_of
from pyro_ext.infer.svi.capture.operation_log import (
    CaptureError,
    CurrentSite,
    Outcome,
    TensorsForNumbers,
)
from pyro_ext.infer.svi.capture.value_reads import (
    ValueGuard,
    ValueReads,
    is_random,
    split_off_guard,
)


def compute(objective: Callable[[], Any], has_gradients: bool) -> Outcome:
    """Compute the loss of a step and its gradients, without reading the value of any tensor.

    :param objective: a function that returns the loss. The gradients are those of all tensors
        whose ``backward`` it calls, or else those of the loss.
    :param has_gradients: whether to compute gradients.
    :returns: the loss, the gradients and the parameters.
    :raises CaptureError: if the loss is not a tensor, or a gradient is sparse.
    """
    torch.clear_autocast_cache()  # the cache may hold casts of earlier parameters
    with without_looking_at_values(), params_kept_in_place(), torch.enable_grad():
        with poutine.trace(param_only=True) as trace, _LateBackward() as late:
            value = objective()
        if not isinstance(value, Tensor):
            raise CaptureError(f"the loss must be a tensor, but its type is {type(value).__name__}")
        loss = sum(late.tensors) if late.tensors else value
        params = params_of(trace.trace)
        first_names = {param: name for name, param in reversed(params.items())}
        gradients: dict[str, Tensor | None] = dict.fromkeys(reversed(first_names.values()))
        wanted = {name: params[name] for name in gradients if params[name].requires_grad}
        if has_gradients and loss.requires_grad and wanted:
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            gradients |= _own_gradients(wanted, found)
        return Outcome(value.detach(), gradients, params)


class _LateBackward(TorchFunctionMode):
    """A mode that collects the tensors whose ``backward`` is called, and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            self.tensors.append(args[0])
            return None
        return func(*args, **(kwargs or {}))


class _WithoutBranches(TorchFunctionMode):
    """A mode in which Pyro's expectation over enumerated sites has fixed shapes.

    Pyro selects the terms with positive probability. Here, the others become zero.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.all:
            return False
        if func is Tensor.masked_select:
            x, mask = args
            return torch.where(mask, x, 0.0)
        return func(*args, **(kwargs or {}))


def _own_gradients(
    params: dict[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Return gradients that have the strides of their parameters and share no memory."""
    own: dict[str, Tensor | None] = {}
    storages = {storage_of(param) for param in params.values()}
    for (name, param), gradient in zip(params.items(), gradients, strict=True):
        if gradient is not None:
            if gradient.layout != torch.strided:
                raise CaptureError(f"the gradient of '{name}' is sparse (use sparse=False)")
            storage = storage_of(gradient)
            # Fused optimisers assume that a gradient has the strides of its parameter.
            if gradient.stride() != param.stride() or storage in storages:
                gradient = torch.empty_like(param).copy_(gradient)
            storages.add(storage)
        own[name] = gradient
    return own


#: One capture at a time, because a capture replaces functions of torch and Pyro for its thread.
LOCK = threading.RLock()


@contextmanager
def without_looking_at_values() -> Iterator[None]:
    """Turn off all code of Pyro that reads values: validation, warnings of NaN, and branches.

    It stays as it is in other threads.
    """
    thread = threading.get_ident()
    initialize, validate = Distribution.__init__, Distribution._validate_sample

    def initialize_unchecked(self: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == thread:
            # Distributions with validate_args=True ignore the global switch.
            args, kwargs = args[:2], {**kwargs, "validate_args": False}
        initialize(self, *args, **kwargs)

    def accept(self: Any, value: Tensor) -> None:
        if threading.get_ident() != thread:
            validate(self, value)

    expectation = Dice.compute_expectation

    def expectation_without_branches(self: Dice, costs: Any) -> Any:
        with _WithoutBranches():
            return expectation(self, costs)

    with LOCK, ExitStack() as stack:
        stack.enter_context(patch.object(Distribution, "__init__", initialize_unchecked))
        stack.enter_context(patch.object(Distribution, "_validate_sample", accept))
        replaced = _unless_in(thread, expectation, expectation_without_branches)
        stack.enter_context(patch.object(Dice, "compute_expectation", replaced))
        for module, (name, otherwise) in itertools.product(list(sys.modules.values()), _CHECKS):
            original = vars(module).get(name) if isinstance(module, ModuleType) else None
            if callable(original) and original.__module__.startswith("pyro."):
                replaced = _unless_in(thread, original, otherwise)
                stack.enter_context(patch.object(module, name, replaced))
        yield


def _common_scale(scales: Sequence[Any]) -> Any:
    """Return the scale of all enumerated sites. Only the result of the comparison is read."""
    first = scales[0]
    if any(bool(scale != first) for scale in scales if scale is not first):
        raise ValueError("enumerated sites have different scales")
    return first


#: Functions of Pyro that read values, or decide whether to read them, with replacements.
_CHECKS: list[tuple[str, Callable[..., Any]]] = [
    ("is_validation_enabled", lambda: False),
    ("warn_if_nan", lambda value, *args, **kwargs: value),
    ("warn_if_inf", lambda value, *args, **kwargs: value),
    (COMMON_SCALE, _common_scale),
]


def _unless_in(
    thread: int, function: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that is replaced by another one in one thread."""

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = otherwise if threading.get_ident() == thread else function
        return chosen(*args, **kwargs)

    return call


def capture(
    run: Callable[[], Outcome], inputs: Sequence[Tensor], changing: Collection[int]
) -> tuple[GraphModule, ValueGuard]:
    """Capture the graph of a run that reads the inputs.

    :param run: the run. It may reach the inputs in any way.
    :param inputs: the tensors that become inputs of the graph.
    :param changing: the positions of the inputs that change in each step: the parameters.
    :returns: the graph, and a guard of the values of inputs on which it depends.
    :raises CaptureError: if Python code or the shape of a result depends on values of parameters
        or on random numbers.
    """
    site = CurrentSite()
    reads = ValueReads(site)

    def traced(*inputs: Tensor) -> list[Tensor | None]:
        with site, reads, TensorsForNumbers(read=reads.read):
            return [*run().tensors, *reads.tensors]

    with site.named_in_errors():
        graph = make_fx(traced)(*inputs)
    guard = split_off_guard(graph, reads, changing)
    _keep_random_numbers(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, guard


def _keep_random_numbers(graph: GraphModule) -> None:
    """Keep the draws of unused random numbers, so that the later ones equal those of Pyro."""
    (output,) = graph.graph.find_nodes(op="output")
    unused = [node for node in graph.graph.nodes if is_random(node.target) and not node.users]
    output.args = ([*output.args[0], *unused],)
