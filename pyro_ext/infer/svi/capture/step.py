"""Runs a step, as it is and in a way that can be captured."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    ReweightedWakeSleep,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._private.of_torch import storage_of
from pyro_ext.distributed.noise import DistributedNoise
from pyro_ext.infer.svi.capture.graph_inputs import (
    Arguments,
    OwnParams,
    current_params,
    params_kept_in_place,
    params_of,
)
from pyro_ext.infer.svi.capture.operation_log import CaptureError, Outcome
from pyro_ext.infer.svi.capture.recorder import GraphRecorder
from pyro_ext.infer.svi.capture.value_checks import without_looking_at_values
from pyro_ext.tracing import Program

_DEVICES = "cpu", "cuda"

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
    return torch.get_default_dtype(), tuple(map(_autocast, _DEVICES))


def _autocast(device: str) -> tuple[str, bool, torch.dtype]:
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


@dataclass(eq=False)
class Step(ABC):
    """A step of a training loop: the loss of a model and guide, and its gradients.

    A subclass says which parameters get gradients, and how the loop gets them without a graph.

    :param objective: the ELBO, or a function that returns a differentiable loss.
    :param model: the model.
    :param guide: the guide.
    :param has_gradients: whether the step computes gradients.
    :param handlers: the effect handlers around the step.
    """

    objective: Any
    model: Program
    guide: Program
    has_gradients: bool
    handlers: tuple[Any, ...]

    @abstractmethod
    def refusal(self) -> str | None:
        """Return why no graph can take this step, or None."""

    def keeps(self, value: Any, recorder: GraphRecorder) -> bool:
        """Return whether a graph can leave a value where the programs leave it."""
        return recorder.knows(value)

    @abstractmethod
    def run_eagerly(self, arguments: Arguments, names: Sequence[str]) -> Outputs:
        """Return the loss and the gradients of the named parameters, without a graph."""

    def own_params(self) -> OwnParams:
        """Return the places of the parameters that may be outside of the param store, by name."""
        return {}

    def params(self) -> dict[str, Tensor]:
        """Return the parameters that may get gradients now, by name."""
        return current_params(self.own_params())

    def used_params(self, trace: Any) -> dict[str, Tensor]:
        """Return the parameters that a run may have used, from a trace of its parameters."""
        return params_of(trace)

    def differentiate(
        self, loss: Tensor, params: Sequence[Tensor], retain_graph: bool = False
    ) -> Sequence[Tensor | None]:
        """Return the gradients of a loss in parameters that require gradients."""
        return torch.autograd.grad(loss, params, retain_graph=retain_graph, allow_unused=True)

    def gradients(
        self, loss: Tensor, params: dict[str, Tensor], retain_graph: bool = False
    ) -> dict[str, Tensor | None]:
        """Return the gradient of a loss in each parameter, or None where there is none."""
        found: dict[str, Tensor | None] = dict.fromkeys(params)
        wanted = {name: param for name, param in params.items() if param.requires_grad}
        if self.has_gradients and loss.requires_grad and wanted:
            gradients = self.differentiate(loss, list(wanted.values()), retain_graph)
            found |= zip(wanted, gradients, strict=True)
        return found

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
        """Compute the loss and gradients without reading the value of any tensor.

        The gradients are those of all tensors whose ``backward`` the objective calls, or else those
        of the loss.

        :raises CaptureError: if the objective has no graph, the loss is not a tensor, or a gradient
            is sparse.
        """
        for classes, reason in _WITHOUT_GRAPHS.items():
            if any(isinstance(objective, classes) for _, objective in self.objectives):
                raise CaptureError(f"{type(self.objective).__name__} {reason}")
        torch.clear_autocast_cache()  # the cache may hold casts of earlier parameters
        with without_looking_at_values(), params_kept_in_place(), torch.enable_grad():
            with poutine.trace(param_only=True) as trace, _LateBackward() as late:
                value = self.evaluate(self.loss_function(), arguments)
            if not isinstance(value, Tensor):
                raise CaptureError(
                    f"the loss must be a tensor, but its type is {type(value).__name__}"
                )
            loss = torch.stack(late.tensors).sum() if late.tensors else value
            params = self.used_params(trace.trace)
            first_names = {param: name for name, param in reversed(params.items())}
            first = {name: params[name] for name in reversed(first_names.values())}
            gradients = _own_gradients(first, self.gradients(loss, first))
            return Outcome(value.detach(), gradients, params)

    def loss_function(self) -> Callable[..., Any]:
        """Return the function that computes the differentiable loss."""
        loss: Callable[..., Any] = self.objective.differentiable_loss
        return loss

    def evaluate(self, loss: Callable[..., Any], arguments: Arguments) -> Any:
        """Return the value of a loss function for the programs and arguments."""
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
        handlers = [
            (type(handler).__name__, handler)
            for handler in self.handlers
            if not isinstance(handler, DistributedNoise)  # its streams are no settings
        ]
        return [("model", self.model), ("guide", self.guide), *self.objectives, *handlers]


@dataclass(eq=False)
class SVIStep(Step):
    """A step of Pyro's ``SVI``.

    :param svi_loss: the function with which ``SVI`` evaluates the loss. With ``has_gradients``, it
        adds the gradients to ``.grad``.
    """

    svi_loss: Callable[..., Any]

    def loss_function(self) -> Callable[..., Any]:
        """Return the differentiable loss, or a function that calls ``backward``."""
        has_loss = all(hasattr(x, "differentiable_loss") for _, x in self.objectives)
        return super().loss_function() if has_loss else self.svi_loss

    def refusal(self) -> str | None:
        """Return why no graph can take this step, or None."""
        if not pyro.settings.get("module_local_params"):
            return None
        return (
            "with the setting module_local_params, parameters are not in the param store, from "
            "which a graph reads them"
        )

    def run_eagerly(self, arguments: Arguments, names: Sequence[str]) -> Outputs:
        """Compute the loss and the gradients of the named parameters, as ``SVI`` does."""
        params = current_params()
        before = {param: param.grad for param in params.values()}
        for param in before:
            param.grad = None
        try:
            grad_mode = torch.set_grad_enabled(self.has_gradients)
            with grad_mode, params_kept_in_place(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self.evaluate(self.svi_loss, arguments)
            return [as_tensor(loss), *(params[name].grad for name in names)]
        finally:
            for param, gradient in before.items():
                param.grad = gradient


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


def _own_gradients(
    params: dict[str, Tensor], gradients: dict[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Return gradients that have the strides of their parameters and share no memory."""
    own: dict[str, Tensor | None] = {}
    storages = {storage_of(param) for param in params.values()}
    for name, param in params.items():
        gradient = gradients[name]
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


def autocast_devices() -> list[str]:
    """Return the kinds of devices for which autocast is on."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast for all devices in a block."""
    devices = autocast_devices()
    try:
        for device in devices:
            torch.set_autocast_enabled(device, False)
        yield
    finally:
        for device in devices:
            torch.set_autocast_enabled(device, True)


def as_tensor(loss: Any) -> Tensor:
    """Return a loss as a tensor without dims."""
    return torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
