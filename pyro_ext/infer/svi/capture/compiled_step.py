"""One captured step: how it is made, checked and run."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_ext._private.of_torch import pytree
from pyro_ext._random_states import kept_random_states
from pyro_ext.infer.svi.capture.backends import Backend, CompileError, compile_graph
from pyro_ext.infer.svi.capture.graph import capture, compute
from pyro_ext.infer.svi.capture.graph_inputs import (
    Arguments,
    TensorSource,
    current_params,
    find_source,
)
from pyro_ext.infer.svi.capture.lifted_floats import LiftedFloats
from pyro_ext.infer.svi.capture.operation_log import (
    CaptureError,
    OperationLog,
    Outcome,
    log_operations,
)
from pyro_ext.infer.svi.capture.reachable_search import find_reachable
from pyro_ext.infer.svi.capture.reachable_state import ReachableState
from pyro_ext.tracing import Program

_SEED = 20_090_911
_SCHEDULE = "loss.schedule"  # whose factor reaches the graph as a tensor

_Outputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Step:
    """A step as Pyro runs it.

    :param objective: the ELBO, or a function that returns a differentiable loss.
    :param model: the model.
    :param guide: the guide.
    :param svi_loss: the function by which ``SVI`` evaluates the loss. It adds gradients to
        ``.grad`` if they are wanted.
    :param bool has_gradients: whether gradients are wanted.
    :param handlers: the effect handlers around the step.
    """

    objective: Any
    model: Program
    guide: Program
    svi_loss: Callable[..., Any]
    has_gradients: bool
    handlers: tuple[Any, ...] = ()

    def compute(self, arguments: Arguments) -> Outcome:
        """Loss and gradients, in a way that can be captured."""
        objective = self.objective
        loss = getattr(objective, "differentiable_loss", objective)
        if loss is objective and hasattr(objective, "loss_and_grads"):
            raise CaptureError(f"{type(objective).__name__} has no differentiable_loss")
        return compute(partial(self._evaluate, loss, arguments), self.has_gradients)

    def run_as_svi(self, arguments: Arguments, names: Sequence[str]) -> _Outputs:
        """What ``SVI`` would compute: the loss, and gradients of the parameters of some names."""
        params = current_params()
        before = {param: param.grad for param in params.values()}
        for param in before:
            param.grad = None
        try:
            with torch.set_grad_enabled(self.has_gradients), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self._evaluate(self.svi_loss, arguments)
            dtype = None if isinstance(loss, Tensor) else torch.float64
            return [torch.as_tensor(loss, dtype=dtype), *(params[name].grad for name in names)]
        finally:
            for param, gradient in before.items():
                param.grad = gradient

    def _evaluate(self, loss: Callable[..., Any], arguments: Arguments) -> Any:
        args, kwargs = pytree.tree_unflatten(arguments.leaves, arguments.spec)
        return loss(self.model, self.guide, *args, **kwargs)

    @property
    def objectives(self) -> list[tuple[str, Any]]:
        """The objective, and the one inside of it if there is one, with their names."""
        inner = getattr(self.objective, "elbo", None)
        outer = [("loss", self.objective)]
        return outer if inner is None else [*outer, ("loss.elbo", inner)]

    @property
    def roots(self) -> list[tuple[str, Any]]:
        """What can change a step from outside, with names."""
        handlers = [(type(handler).__name__, handler) for handler in self.handlers]
        return [("model", self.model), ("guide", self.guide), *self.objectives, *handlers]


@dataclass
class CompiledStep:
    """A captured step and what it took for granted."""

    step: Step
    run: Callable[..., _Outputs]
    sources: list[TensorSource]
    names: list[str]
    tied: list[tuple[str, str]]
    reachable: ReachableState
    lifted: LiftedFloats
    log: OperationLog
    num_runs: int = 0

    def __call__(self, arguments: Arguments, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Loss and gradients, the latter in the order of ``names``."""
        self.num_runs += 1
        self.lifted.update()
        with torch.no_grad():
            return self.run(*self.lifted.lift(arguments).tensors, *inputs)

    def inputs(self, params: dict[str, Tensor]) -> list[Tensor] | None:
        """The tensors of now that the graph reads beside arguments; None if they do not fit."""
        is_tied = all(params.get(name) is params.get(other) for name, other in self.tied)
        if not (is_tied and self.lifted.matches):
            return None
        found: list[Tensor] = []
        for source in self.sources:
            tensor = source.get(params)
            if tensor is None:
                return None
            found.append(tensor)
        return found

    def audit(self, arguments: Arguments) -> str | None:
        """What the programs do differently from what was captured; None if nothing."""
        aliases = self.lifted.lift(arguments).aliases
        try:
            with kept_random_states(_SEED), self.lifted.in_place():
                now, _ = log_operations(partial(self.step.compute, aliases))
        except CaptureError as error:
            return str(error)
        return self.log.difference(now)


class NeedsEagerStepError(Exception):
    """A step makes parameters, whose first values a capture must not draw."""


def build_step(step: Step, arguments: Arguments, lifts: bool, backend: Backend) -> CompiledStep:
    """Captures, checks and compiles a step; random and other states stay as they were.

    :param Step step: the step.
    :param Arguments arguments: those of its programs.
    :param bool lifts: whether floats, of the objective and among the arguments, become inputs.
    :param Backend backend: what compiles.
    :raises CaptureError: if a graph would not do what the programs do.
    :raises NeedsEagerStepError: if the programs make parameters.
    :raises CompileError: if the compiler fails.
    :raises RuntimeError: if the compiled graph computes something else.
    """
    if any(tensor.requires_grad for tensor in arguments.tensors):
        raise CaptureError("an argument requires gradients")
    if any(tensor.layout != torch.strided for tensor in arguments.tensors):
        raise CaptureError("an argument is a sparse tensor")
    lifted = LiftedFloats(step.objectives, lifts)
    aliases = lifted.lift(arguments).aliases
    before = find_reachable(step.roots, [*lifted.labels, _SCHEDULE])
    try:
        with lifted.in_place():
            log, reachable, externals, outcome = _log_twice(step, arguments, aliases, lifted)
            inputs = [*aliases.tensors, *externals]
            with kept_random_states(_SEED + 2), log.undone():
                graph = capture(partial(step.compute, aliases), inputs)
        names = list(outcome.gradients)
        expected = _outputs(partial(step.run_as_svi, arguments, names), log)

        def difference(run: Callable[..., _Outputs]) -> str | None:
            return _difference(expected, _outputs(partial(run, *inputs), log), names)

        compiled = _compile(graph, inputs, backend, difference)
    finally:
        before.restore()
    params = current_params()
    return CompiledStep(
        step=step,
        run=compiled,
        sources=[find_source(tensor, params, reachable) for tensor in externals],
        names=names,
        tied=[
            (name, other)
            for name, param in outcome.params.items()
            for other in names
            if name != other and param is outcome.params[other]
        ],
        reachable=reachable,
        lifted=lifted,
        log=log,
    )


def _log_twice(
    step: Step, arguments: Arguments, aliases: Arguments, lifted: LiftedFloats
) -> tuple[OperationLog, ReachableState, list[Tensor], Outcome]:
    """Logs runs with different random numbers of all kinds, which are to do the same.

    :returns: the log, the reachable state, the tensors from elsewhere, and the outcome.
    """
    run = partial(step.compute, aliases)
    known = set(current_params())
    with kept_random_states(_SEED):
        # What happens in a first run only, such as finding out the plates, happens here.
        warm_up, _ = log_operations(run)
    born = current_params().keys() - known
    if born:
        for name in born:
            del pyro.get_param_store()[name]
        raise NeedsEagerStepError
    opaque = [("argument", leaf) for leaf in aliases.leaves if not isinstance(leaf, Tensor)]
    modules = [(type(module).__name__, module) for module in warm_up.modules]
    reachable = find_reachable([*step.roots, *opaque, *modules], [*lifted.labels, _SCHEDULE])
    with kept_random_states(_SEED):
        first, _ = log_operations(run)
    floats = [
        alias
        for alias, leaf in zip(aliases.leaves, arguments.leaves, strict=True)
        if isinstance(alias, Tensor) and type(leaf) is float
    ]
    with kept_random_states(_SEED + 1), lifted.nudged(floats):
        second, outcome = log_operations(run)
    changed = reachable.changed_by_programs()
    reason = (
        f"the programs change '{changed}' themselves"
        if changed is not None
        else first.difference(second) or first.difference_of_externals(second)
    )
    if reason is not None:
        raise CaptureError(reason)
    given = set(aliases.tensors)
    externals = zip(first.externals, second.externals, strict=True)
    lasting = [x for other, x in externals if x is other and x not in given]  # others are constants
    return second, reachable, lasting, outcome


def _compile(
    graph: GraphModule,
    inputs: Sequence[Tensor],
    backend: Backend,
    difference: Callable[[Callable[..., _Outputs]], str | None],
) -> Callable[..., _Outputs]:
    """Compiles a graph, and compares it with the programs before and after.

    :param difference: says where the outputs of a graph differ from those of the programs; None
        if they are the same.
    """
    reason = difference(graph)
    if reason is not None:
        raise CaptureError(f"the graph does not compute what the programs do: {reason}")
    compiled = compile_graph(graph, inputs, backend)
    try:
        reason = difference(compiled)
    except Exception as error:
        raise CompileError(f"what {backend.name} compiled fails: {error}") from error
    if reason is not None:
        raise RuntimeError(
            f"CompiledSVI: the step compiled by {backend.name} does not compute what the "
            f"eager one does: {reason}. Expected the same up to rounding; use backend='eager'."
        )
    return compiled


def _outputs(run: Callable[[], _Outputs], log: OperationLog) -> list[Any]:
    """Outputs for noise other than that of the capture, and the state of the generator after."""
    with log.undone(), kept_random_states(_SEED + 3), torch.no_grad():
        outputs = [x if x is None else x.detach().clone() for x in run()]
        return [*outputs, torch.get_rng_state()]


def _difference(expected: Sequence[Any], found: Sequence[Any], names: Sequence[str]) -> str | None:
    """Where outputs differ by more than rounding; None if they do not."""
    if not torch.equal(expected[-1], found[-1]):
        return "it draws other random numbers"
    gradients = [x for x in expected[1:-1] if x is not None]
    largest = max((_max_abs(x) for x in gradients), default=0.0)
    pairs = zip(("the loss", *names), expected, found, strict=False)
    for i, (name, x, y) in enumerate(pairs):
        if x is None or y is None:
            if x is not y:
                return f"the gradient of '{name}' is there in one of them only"
            continue
        if i > 0 and x.dtype != y.dtype:
            return f"'{name}' has dtype {x.dtype} in one, {y.dtype} in the other"
        eps = torch.finfo(y.dtype).eps
        tolerance = math.sqrt(eps) * _max_abs(x) + 100 * eps * largest
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return f"'{name}' is finite in one of them only"
        difference = _max_abs((x - y)[finite])
        if difference > tolerance:
            return f"'{name}' differs by {difference:.3g}, its largest entry is {_max_abs(x):.3g}"
    return None


def _max_abs(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0
