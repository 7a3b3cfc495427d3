"""Captures the loss and gradients of a step as a graph, a function of tensors only."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.infer.svi.capture.operation_log import (
    CaptureError,
    CurrentSite,
    Outcome,
    TensorsForNumbers,
)

#: One capture at a time, because a capture replaces functions of torch and Pyro for its thread.
LOCK = threading.RLock()


@contextmanager
def without_looking_at_values() -> Iterator[None]:
    """Turn off all checks that read values: validation, and Pyro's warnings of NaN.

    They stay on in other threads.
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

    with LOCK, ExitStack() as stack:
        stack.enter_context(patch.object(Distribution, "__init__", initialize_unchecked))
        stack.enter_context(patch.object(Distribution, "_validate_sample", accept))
        for module, (name, otherwise) in itertools.product(list(sys.modules.values()), _CHECKS):
            original = vars(module).get(name) if isinstance(module, ModuleType) else None
            if callable(original) and original.__module__.startswith("pyro."):
                replaced = _unless_in(thread, original, otherwise)
                stack.enter_context(patch.object(module, name, replaced))
        yield


#: Functions of Pyro that read values, or decide whether to read them, with replacements.
_CHECKS: list[tuple[str, Callable[..., Any]]] = [
    ("is_validation_enabled", lambda: False),
    ("warn_if_nan", lambda value, *args, **kwargs: value),
    ("warn_if_inf", lambda value, *args, **kwargs: value),
]


def _unless_in(
    thread: int, function: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that is replaced by another one in one thread."""

    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = otherwise if threading.get_ident() == thread else function
        return chosen(*args, **kwargs)

    return call


def capture(run: Callable[[], Outcome], inputs: Sequence[Tensor]) -> GraphModule:
    """Capture the graph of a run that reads the inputs.

    :param run: the run. It may reach the inputs in any way.
    :param inputs: the tensors that become inputs of the graph.
    :returns: the graph.
    :raises CaptureError: if the run reads values of tensors, or if the shape of a result depends
        on values.
    """
    site = CurrentSite()

    def traced(*inputs: Tensor) -> list[Tensor | None]:
        with site, TensorsForNumbers():
            return run().tensors

    with site.named_in_errors():
        graph = make_fx(traced)(*inputs)
    for node in _variable_nodes(graph):
        if _has_shape_of_values(node):
            raise CaptureError(
                f"the shape of the result of {node.target} depends on values. Use operations with "
                "fixed shapes, such as torch.where"
            )
    _keep_random_numbers(graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _variable_nodes(graph: GraphModule) -> Iterator[Node]:
    """Yield the nodes that depend on inputs or random numbers. All others are constants."""
    variable: set[Node] = set()
    for node in graph.graph.nodes:
        is_source = node.op == "placeholder" or is_random(node.target)
        if is_source or not variable.isdisjoint(node.all_input_nodes):
            variable.add(node)
            yield node


def _has_shape_of_values(node: Node) -> bool:
    if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
        return False
    if node.target is not torch.ops.aten.index.Tensor:
        return True
    masks = [index for index in node.args[1] if isinstance(index, Node)]  # type: ignore[union-attr]
    return any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in masks)


def _keep_random_numbers(graph: GraphModule) -> None:
    """Keep the draws of unused random numbers, so that the later ones equal those of Pyro."""
    (output,) = graph.graph.find_nodes(op="output")
    unused = [node for node in graph.graph.nodes if is_random(node.target) and not node.users]
    output.args = ([*output.args[0], *unused],)


def is_random(operator: Any) -> bool:
    """Return whether an operator draws from a random generator of torch."""
    return torch.Tag.nondeterministic_seeded in getattr(operator, "tags", ())
