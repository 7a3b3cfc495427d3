"""Runs a step of ``SVI``, as it is and in a way that can be captured."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext.infer.svi.capture.graph import compute
from pyro_ext.infer.svi.capture.graph_inputs import Arguments, current_params, params_kept_in_place
from pyro_ext.infer.svi.capture.operation_log import CaptureError, Outcome
from pyro_ext.tracing import Program

Outputs = Sequence[Tensor | None]
#: The default dtype, and the autocast mode of each kind of device.
Context = tuple[torch.dtype, tuple[tuple[str, bool, torch.dtype], ...]]

#: Objectives of Pyro that cannot be captured, with reasons.
_WITHOUT_GRAPHS: dict[tuple[type, ...], str] = {
    (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO): (
        "is compiled by torch.jit. Use the class without Jit in its name"
    ),
    (ReweightedWakeSleep,): "has two losses, but a graph returns one",
    (TraceTailAdaptive_ELBO,): "has gradients, but no loss",
}


def current_context() -> Context:
    """Return the global modes of torch that change the operations of a step."""
    return torch.get_default_dtype(), tuple(map(_autocast, ("cpu", "cuda")))


def _autocast(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


class Step(NamedTuple):
    """A step of Pyro's ``SVI``.

    :param objective: the ELBO, or a function that returns a differentiable loss.
    :param model: the model.
    :param guide: the guide.
    :param svi_loss: the function with which ``SVI`` evaluates the loss. With ``has_gradients``, it
        adds the gradients to ``.grad``.
    :param has_gradients: whether the step computes gradients.
    :param handlers: the effect handlers around the step.
    """

    objective: Any
    model: Program
    guide: Program
    svi_loss: Callable[..., Any]
    has_gradients: bool
    handlers: tuple[Any, ...] = ()

    @contextmanager
    def in_context(self, context: Context) -> Iterator[None]:
        """Put the effect handlers of the step, and modes of torch, around a block."""
        dtype, autocast = context
        handlers, default = [*HANDLER_STACK], torch.get_default_dtype()
        try:
            HANDLER_STACK[:] = self.handlers
            torch.set_default_dtype(dtype)
            with ExitStack() as stack:
                for device, is_enabled, of_device in autocast:
                    if (is_enabled, of_device) != _autocast(device)[1:]:
                        mode = torch.autocast(device, dtype=of_device, enabled=is_enabled)
                        stack.enter_context(mode)
                yield
        finally:
            torch.set_default_dtype(default)
            HANDLER_STACK[:] = handlers

    def compute(self, arguments: Arguments) -> Outcome:
        """Compute the loss and gradients in a way that can be captured."""
        for classes, reason in _WITHOUT_GRAPHS.items():
            if any(isinstance(x, classes) for _, x in self.objectives):
                raise CaptureError(f"{type(self.objective).__name__} {reason}")
        has_loss = all(hasattr(x, "differentiable_loss") for _, x in self.objectives)
        loss = self.objective.differentiable_loss if has_loss else self.svi_loss
        return compute(partial(self._evaluate, loss, arguments), self.has_gradients)

    def run_as_svi(self, arguments: Arguments, names: Sequence[str]) -> Outputs:
        """Compute the loss and the gradients of the named parameters, as ``SVI`` does."""
        params = current_params()
        before = {param: param.grad for param in params.values()}
        for param in before:
            param.grad = None
        try:
            grad_mode = torch.set_grad_enabled(self.has_gradients)
            with grad_mode, params_kept_in_place(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self._evaluate(self.svi_loss, arguments)
            return [as_tensor(loss), *(params[name].grad for name in names)]
        finally:
            for param, gradient in before.items():
                param.grad = gradient

    def _evaluate(self, loss: Callable[..., Any], arguments: Arguments) -> Any:
        args, kwargs = arguments.unflatten()
        return loss(self.model, self.guide, *args, **kwargs)

    @property
    def objectives(self) -> list[tuple[str, Any]]:
        """The objective, and its inner ELBO if it has one, with their names."""
        inner = getattr(self.objective, "elbo", None)
        outer = [("loss", self.objective)]
        return outer if inner is None else [*outer, ("loss.elbo", inner)]

    @property
    def roots(self) -> list[tuple[str, Any]]:
        """The objects that determine the operations of a step, with their names."""
        handlers = [(type(handler).__name__, handler) for handler in self.handlers]
        return [("model", self.model), ("guide", self.guide), *self.objectives, *handlers]


def as_tensor(loss: Any) -> Tensor:
    """Return a loss as a tensor without dims."""
    return torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
