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

from pyro_ext._arguments import check_integer
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

    The first step is Pyro's own. Then loss and gradients are captured as a graph, with the effect
    handlers run for the last time, checked against the eager ones on the same noise, and
    compiled. It computes what ``SVI`` computes, from the same random numbers, up to rounding, and
    ``pyro.set_rng_seed`` seeds it. Each structure of arguments (shapes, dtypes, devices, plain
    values) gets a graph of its own.

    Parameters, buffers and other tensors are looked up at each step, so that updates,
    ``load_state_dict`` and edits of the param store are seen. Plain values that the programs
    reach by name (attributes, globals, closures, also ``training`` of modules) are compared at
    each step; another value gets another graph. Numbers that are floats, as arguments or as
    attributes of the objective (an alpha), are inputs of the graph, and so is the factor of a
    :class:`KLWeightedELBO`. At steps 2, 4, 8, ... the programs run once more, to see that they
    still do the same. Capture and checks run the programs some six times, with random
    numbers of their own; what they print or count beside tensors, they do at these times only.

    Where a step cannot be captured (a branch on a sampled value, Python's or NumPy's random
    numbers, results whose shape depends on values, hooks on gradients), eager steps are taken, and
    one warning says why. Distributions do not validate their arguments in a compiled step.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, likewise.
    :param PyroOptim optim: the optimiser. Where its torch optimiser has a fused or foreach
        implementation, one of those steps all parameters at once.
    :param loss: an ELBO with a ``differentiable_loss`` (every one of this package and Pyro's
        ``Trace_ELBO``, ``TraceMeanField_ELBO``), or a function that returns a differentiable loss.
    :param str backend: ``"inductor"`` compiles, which takes seconds and a C++ compiler on a CPU;
        ``"eager"`` runs the graph as it is.
    :param str mode: a mode of ``torch.compile`` for Inductor; ``"reduce-overhead"`` uses CUDA
        graphs on a GPU.
    :param bool fallback: whether to take eager steps, with a warning, where there is no graph;
        otherwise that is an error.
    :param int max_graphs: how many graphs there may be.
    :raises ValueError: where an argument is out of range; when run, if the loss is not finite.
        Parameters are then as they were.
    :raises RuntimeError: when run, if a compiled graph does not compute what the eager step does;
        and if a step cannot be captured, where ``fallback`` is off.

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
                f"CompiledSVI: expected backend to be 'inductor' or 'eager', got {backend!r}."
            )
        if mode not in MODES:
            raise ValueError(f"CompiledSVI: expected mode to be one of {MODES}, got {mode!r}.")
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
        """Takes a step and returns the loss, as ``SVI.step``.

        :param args: passed to model and guide, as are ``kwargs``.
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
            self._do_without("a hook on the gradient of a parameter is not in a graph")
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
        """The loss without a step, as ``SVI.evaluate_loss``.

        :param args: passed to model and guide, as are ``kwargs``.
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
        """Pyro's step, with the same optimiser as compiled ones."""
        with poutine.trace(param_only=True) as trace:
            loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        params = list(dict.fromkeys(params_of(trace.trace).values()))  # tied ones once
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
        """The graph for these arguments, captured if need be; None for an eager step."""
        graphs = self._graphs
        if has_gradients in graphs.given_up or has_gradients > torch.is_grad_enabled():
            return None
        arguments = Arguments(*pytree.tree_flatten((args, kwargs)))
        handlers = tuple(HANDLER_STACK)
        key = (
            has_gradients,
            str(arguments.spec),  # a spec of older versions has no hash
            *(_describe(leaf, graphs.lifts) for leaf in arguments.leaves),
            *map(_SameObject, (self.objective, self.model, self.guide, *handlers)),
            *_context(),
        )
        params = current_params()
        reason = "other arguments"
        for graph in graphs.by_key.get(key, ()):
            changed = graph.reachable.changed()
            inputs = graph.inputs(params) if changed is None else None
            if inputs is not None:
                return _Ready(graph, params, arguments, inputs)
            reason = "a tensor of another shape" if changed is None else f"another '{changed}'"
        if graphs.count >= self.max_graphs:
            self._do_without(f"there are max_graphs={self.max_graphs}, and now {reason}")
            return None
        svi_loss = self.loss_and_grads if has_gradients else self.loss
        step = Step(self.objective, self.model, self.guide, svi_loss, has_gradients, handlers)
        try:
            built = build_step(step, arguments, graphs.lifts, graphs.backend)
        except NeedsEagerStepError:
            return None
        except CompileError as error:
            self._do_without(str(error), error, "runs graphs as they are")
            graphs.backend = Backend("eager", self.backend.mode)
            return self._ready(has_gradients, args, kwargs)
        except CaptureError as error:
            if graphs.lifts:
                # Perhaps a float is one that the programs branch on.
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
                f"CompiledSVI: expected a step that can be compiled (fallback=False), but {reason}."
            ) from cause
        if reason not in self._graphs.warned:
            self._graphs.warned.add(reason)
            warnings.warn(f"CompiledSVI {instead}: {reason}.", stacklevel=4)

    def _raise_for(self, loss: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with pyro.validation_enabled(False):
            self.loss(self.model, self.guide, *args, **kwargs)  # names the site, if it can
        raise ValueError(f"CompiledSVI: expected a finite loss, got {loss}.")


@dataclass
class _Graphs:
    """The graphs of an SVI, and why it has none for some steps."""

    backend: Backend
    by_key: dict[Any, list[CompiledStep]] = field(default_factory=dict)
    lifts: bool = True
    given_up: set[bool] = field(default_factory=set)
    with_gradients: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self.by_key.values()))


class _Ready(NamedTuple):
    """A graph with its inputs."""

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
    """Equal to the same object alone, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.value is other.value


def _context() -> tuple[Any, ...]:
    """What a step depends on beside its arguments and programs."""
    autocast = [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in ("cpu", "cuda")
    ]
    return torch.get_default_dtype(), *autocast
