import math
import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_ext._arguments import check_integer, describe
from pyro_ext._private.of_pyro import HANDLER_STACK
from pyro_ext._private.of_torch import has_gradient_hooks, pytree
from pyro_ext.infer.svi.capture.backends import MODES, Backend, CompileError
from pyro_ext.infer.svi.capture.compiled_step import (
    CompiledStep,
    NeedsEagerStepError,
    Step,
    build_step,
)
from pyro_ext.infer.svi.capture.graph_inputs import (
    Arguments,
    current_params,
    layout,
    params_of,
)
from pyro_ext.infer.svi.capture.operation_log import CaptureError
from pyro_ext.infer.svi.eager_svi import EagerSVI
from pyro_ext.infer.svi.joint_optimizer import JointOptimizer
from pyro_ext.tracing import Program

_FIRST_AUDIT = 2


class CompiledSVI(EagerSVI):
    r"""Pyro's ``SVI`` with steps that run as one compiled graph.

    The first step is Pyro's own. The second step captures the loss and its gradients as a graph.
    The graph is checked against an eager step on the same noise, and then compiled. Later steps run
    no effect handlers, except in the checks below. The graph gives the same results as ``SVI`` from
    the same random numbers, up to rounding, and ``pyro.set_rng_seed`` seeds it. Each combination of
    shapes, dtypes, devices and plain values among the arguments gets its own graph.

    Each step reads the current parameters, buffers and other tensors. Updates,
    ``load_state_dict`` and edits of the param store therefore take effect at once. Each step
    compares the plain values that model and guide reach by name: attributes, globals, closures,
    and the ``training`` flag of modules. If a value has changed, the step gets another graph.
    Floats are inputs of the graph if they are arguments, or attributes of the objective such as
    an alpha. The factor of a :class:`KLWeightedELBO` is an input too.

    At steps 2, 4, 8, ... model and guide run once more, to check that their operations have not
    changed. Capture and checks run them about six times, with separate random numbers. Side
    effects other than those on tensors, such as printing and counting, happen only in these runs.

    Some steps cannot be captured: those with a branch on a sampled value, random numbers of Python
    or NumPy, results whose shape depends on values, or hooks on gradients. ``CompiledSVI`` then
    takes eager steps, and one warning gives the reason. Distributions do not validate their
    arguments in a compiled step.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, a callable with Pyro primitives.
    :param optim: the optimiser. If its torch optimiser has a fused or foreach implementation, that
        implementation steps all parameters at once.
    :param loss: an ELBO with a ``differentiable_loss``, or a function that returns a differentiable
        loss. All ELBOs of this package have one, and so have Pyro's ``Trace_ELBO`` and
        ``TraceMeanField_ELBO``.
    :param backend: ``"inductor"`` compiles the graph. That takes seconds, and needs a C++ compiler
        on a CPU. ``"eager"`` runs the graph without compiling it.
    :param mode: a mode of ``torch.compile`` for Inductor: ``"default"``, ``"reduce-overhead"``,
        ``"max-autotune"`` or ``"max-autotune-no-cudagraphs"``. ``"reduce-overhead"`` uses CUDA
        graphs on a GPU.
    :param fallback: whether to take eager steps, with a warning, if there is no graph. If False,
        that is an error.
    :param max_graphs: the largest number of graphs, >= 1.
    :raises TypeError: if ``max_graphs`` is not an integer.
    :raises ValueError: if an argument is out of range. A step raises it if the loss is not finite,
        and then leaves the parameters as they were.
    :raises RuntimeError: in a step, if a compiled graph and the eager step give different results,
        or if the step cannot be captured and ``fallback`` is False.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> pyro.set_rng_seed(0)
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.7))
    >>> svi = CompiledSVI(
    ...     model, guide, pyro.optim.Adam({"lr": 0.1}), ImportanceWeightedELBO(8), backend="eager"
    ... )
    >>> losses = [svi.step() for _ in range(100)]
    >>> abs(pyro.param("loc").item() - 1.0) < 0.3
    True
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: Any,
        backend: str = "inductor",
        mode: str = "default",
        fallback: bool = True,
        max_graphs: int = 8,
    ) -> None:
        if backend not in ("inductor", "eager"):
            raise ValueError(
                "CompiledSVI: backend must be 'inductor' or 'eager', but it is "
                f"{describe(backend)}."
            )
        if mode not in MODES:
            raise ValueError(
                f"CompiledSVI: mode must be one of {', '.join(map(repr, MODES))}, but it is "
                f"{describe(mode)}."
            )
        check_integer("CompiledSVI", "max_graphs", max_graphs, 1)
        super().__init__(model, guide, optim, loss)
        self.backend = Backend(backend, mode)
        self.fallback = fallback
        self.max_graphs = max_graphs
        self._optimizer = JointOptimizer(optim)
        self._graphs = _Graphs(self.backend)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        optimizer = JointOptimizer(state["optim"])
        return {**state, "_optimizer": optimizer, "_graphs": _Graphs(self.backend)}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, like ``SVI.step``.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss before the step.
        :raises ValueError: if the loss is not finite.
        :raises RuntimeError: as for the class.
        """
        if self._called is None:
            loss = super().step(*args, **kwargs)
            self._ready(True, args, kwargs)
            return loss
        ready = self._ready(True, args, kwargs)
        if ready is None:
            return self._eager_step(*args, **kwargs)
        names = ready.graph.names
        params = [ready.params[name] for name in names]
        if any(has_gradient_hooks(param) for param in params):
            self._do_without(
                "a graph does not run the hook on the gradient of a parameter. Remove the hook"
            )
            return self._eager_step(*args, **kwargs)
        outputs = ready.graph(ready.arguments, ready.inputs)
        loss = outputs[0].item()
        if not math.isfinite(loss):
            self._raise_for(loss, args, kwargs)
        for name, param, gradient in zip(names, params, outputs[1:], strict=False):
            if gradient is not None:
                param.grad = gradient if param.grad is None else param.grad + gradient
                self._graphs.with_gradients.add(name)
            elif param.grad is None and name in self._graphs.with_gradients:
                param.grad = torch.zeros_like(param)  # as Pyro leaves it after a step
        self._update(params)
        for param in params:
            param.grad = None
        self._audit(ready)
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss without taking a step, like ``SVI.evaluate_loss``.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss.
        :raises ValueError: if the loss is NaN.
        :raises RuntimeError: as for the class.
        """
        ready = None if self._called is None else self._ready(False, args, kwargs)
        if ready is None:
            return super().evaluate_loss(*args, **kwargs)
        loss = ready.graph(ready.arguments, ready.inputs)[0].item()
        if math.isnan(loss):
            self._raise_for(loss, args, kwargs)
        self._audit(ready)
        return loss

    def _eager_step(self, *args: Any, **kwargs: Any) -> Any:
        """Take Pyro's step, with the optimiser that compiled steps use."""
        with poutine.trace(param_only=True) as trace:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        params = list(dict.fromkeys(params_of(trace.trace).values()))  # tied parameters once
        self._update(params)
        zero_grads(params)
        return type(loss)(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)

    def _update(self, params: list[Tensor]) -> None:
        if self._optimizer.optim is not self.optim:
            self._optimizer = JointOptimizer(self.optim)
        self._optimizer.step(params)

    def _ready(
        self, has_gradients: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> "_Ready | None":
        """Return the graph for these arguments, or None for an eager step.

        If there is no such graph yet, capture one.
        """
        graphs = self._graphs
        if has_gradients in graphs.given_up or has_gradients > torch.is_grad_enabled():
            return None
        arguments = Arguments(*pytree.tree_flatten((args, kwargs)))
        handlers = tuple(HANDLER_STACK)
        key = (
            has_gradients,
            str(arguments.spec),  # older versions of torch cannot hash a spec
            *(_describe(leaf, graphs.lifts) for leaf in arguments.leaves),
            *map(_SameObject, (self.objective, self.model, self.guide, *handlers)),
            *_context(),
        )
        params = current_params()
        reason = "the arguments differ"
        for graph in graphs.by_key.get(key, ()):
            changed = graph.reachable.changed()
            inputs = graph.inputs(params) if changed is None else None
            if inputs is not None:
                return _Ready(graph, params, arguments, inputs)
            reason = (
                "a tensor has another shape, dtype or device"
                if changed is None
                else f"'{changed}' has another value"
            )
        if graphs.count >= self.max_graphs:
            self._do_without(
                f"there are max_graphs={self.max_graphs} graphs, and now {reason}. Set max_graphs "
                "higher, or change fewer values between steps"
            )
            return None
        svi_loss = self.loss_and_grads if has_gradients else self.loss
        step = Step(self.objective, self.model, self.guide, svi_loss, has_gradients, handlers)
        try:
            built = build_step(step, arguments, graphs.lifts, graphs.backend)
        except NeedsEagerStepError:
            return None
        except CompileError as error:
            self._do_without(str(error), error, "runs graphs without compiling them")
            graphs.backend = Backend("eager", self.backend.mode)
            return self._ready(has_gradients, args, kwargs)
        except CaptureError as error:
            if graphs.lifts:
                # Perhaps the programs branch on a float. Then it cannot be an input of the graph.
                graphs.lifts = False
                return self._ready(has_gradients, args, kwargs)
            graphs.given_up.add(has_gradients)
            self._do_without(str(error), error)
            return None
        graphs.by_key.setdefault(key, []).append(built)
        params = current_params()
        inputs = built.inputs(params)
        return None if inputs is None else _Ready(built, params, arguments, inputs)

    def _audit(self, ready: "_Ready") -> None:
        runs = ready.graph.num_runs
        if runs >= _FIRST_AUDIT and runs & (runs - 1) == 0:
            reason = ready.graph.audit(ready.arguments)
            if reason is not None:
                self._graphs.given_up.add(ready.graph.step.has_gradients)
                self._do_without(f"after {runs} steps, {reason}")

    def _do_without(
        self, reason: str, cause: Exception | None = None, instead: str = "takes eager steps"
    ) -> None:
        if not self.fallback:
            raise RuntimeError(
                f"CompiledSVI cannot compile this step: {reason}. With fallback=True, it warns "
                "instead and goes on without a compiled graph."
            ) from cause
        if reason not in self._graphs.warned:
            self._graphs.warned.add(reason)
            warnings.warn(f"CompiledSVI {instead}: {reason}.", stacklevel=4)

    def _raise_for(self, loss: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with pyro.validation_enabled(False):
            # An error of the ELBO names the site where the loss stops being finite.
            self.loss(self.model, self.guide, *args, **kwargs)
        raise ValueError(
            f"CompiledSVI: the loss is {loss}. Check the data, the parameters and the learning "
            "rate; this step has not changed the parameters."
        )


@dataclass
class _Graphs:
    """The graphs of an SVI, and the reasons for steps without a graph."""

    backend: Backend
    by_key: dict[Any, list[CompiledStep]] = field(default_factory=dict)
    lifts: bool = True
    given_up: set[bool] = field(default_factory=set)
    with_gradients: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """The number of graphs."""
        return sum(map(len, self.by_key.values()))


class _Ready(NamedTuple):
    """A graph with the inputs of one step."""

    graph: CompiledStep
    params: dict[str, Tensor]
    arguments: Arguments
    inputs: list[Tensor]


def _describe(leaf: Any, lifts: bool) -> Any:
    if isinstance(leaf, Tensor):
        return layout(leaf) if leaf.layout == torch.strided else (leaf.layout, leaf.shape)
    if type(leaf) is float and lifts:
        return float
    if isinstance(leaf, (bool, int, float, str, bytes, type(None))):
        return type(leaf), leaf
    return _SameObject(leaf)


class _SameObject:
    """A key that compares an object by identity, and keeps it alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.value is other.value


def _context() -> tuple[Any, ...]:
    """Return the global settings of torch that change the operations of a step."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    return torch.get_default_dtype(), *autocast
