"""Builds, checks and runs one captured step."""

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
_SCHEDULE = "loss.schedule"  # ignored, because its factor is an input of the graph

_Outputs = Sequence[Tensor | None]


@dataclass(frozen=True)
class Step:
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

    def compute(self, arguments: Arguments) -> Outcome:
        """Compute the loss and gradients in a way that can be captured."""
        objective = self.objective
        loss = getattr(objective, "differentiable_loss", objective)
        if loss is objective and hasattr(objective, "loss_and_grads"):
            raise CaptureError(
                f"{type(objective).__name__} has no differentiable_loss, which compiled steps need"
            )
        return compute(partial(self._evaluate, loss, arguments), self.has_gradients)

    def run_as_svi(self, arguments: Arguments, names: Sequence[str]) -> _Outputs:
        """Compute the loss and the gradients of the named parameters, as ``SVI`` does."""
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
        """The objective, and its inner ELBO if it has one, with their names."""
        inner = getattr(self.objective, "elbo", None)
        outer = [("loss", self.objective)]
        return outer if inner is None else [*outer, ("loss.elbo", inner)]

    @property
    def roots(self) -> list[tuple[str, Any]]:
        """The objects that determine the operations of a step, with their names."""
        handlers = [(type(handler).__name__, handler) for handler in self.handlers]
        return [("model", self.model), ("guide", self.guide), *self.objectives, *handlers]


@dataclass
class CompiledStep:
    """A captured step, and the conditions under which it is valid."""

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
        """Return the loss, then the gradients in the order of ``names``."""
        self.num_runs += 1
        self.lifted.update()
        with torch.no_grad():
            return self.run(*self.lifted.lift(arguments).tensors, *inputs)

    def inputs(self, params: dict[str, Tensor]) -> list[Tensor] | None:
        """Return the current tensors that the graph reads, other than its arguments.

        :returns: the tensors; None if they no longer fit the graph.
        """
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
        """Compare the current operations of the programs with the captured ones.

        :returns: the first difference; None if there is none.
        """
        aliases = self.lifted.lift(arguments).aliases
        try:
            with kept_random_states(_SEED), self.lifted.in_place():
                now, _ = log_operations(partial(self.step.compute, aliases))
        except CaptureError as error:
            return str(error)
        return self.log.difference(now)


class NeedsEagerStepError(Exception):
    """An error for a step that creates parameters. A capture must not draw their first values."""


def build_step(step: Step, arguments: Arguments, lifts: bool, backend: Backend) -> CompiledStep:
    """Capture, check and compile a step. Random states and all other states are left unchanged.

    :param step: the step.
    :param arguments: the arguments of model and guide.
    :param lifts: whether floats become inputs of the graph, if they are arguments or attributes of
        the objective.
    :param backend: the settings for compiling.
    :returns: the compiled step.
    :raises CaptureError: if a graph would give other results than the programs.
    :raises NeedsEagerStepError: if the programs create parameters.
    :raises CompileError: if the compiler fails.
    :raises RuntimeError: if the compiled graph gives other results than the programs.
    """
    if any(tensor.requires_grad for tensor in arguments.tensors):
        raise CaptureError("an argument requires gradients. Detach it, or make it a parameter")
    if any(tensor.layout != torch.strided for tensor in arguments.tensors):
        raise CaptureError("an argument is a sparse tensor. Pass a dense tensor")
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
    """Log two runs with different random numbers, and check that their operations are the same.

    :returns: the log of the second run, the reachable state, the external tensors, and the outcome
        of the second run.
    :raises CaptureError: if the runs differ, or if the programs change values that they reach.
    :raises NeedsEagerStepError: if the programs create parameters.
    """
    run = partial(step.compute, aliases)
    known = set(current_params())
    with kept_random_states(_SEED):
        # Programs may initialise themselves in a first run, for example by counting plates.
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
        f"the model or guide changes '{changed}' when it runs. Change it outside of them"
        if changed is not None
        else first.difference(second) or first.difference_of_externals(second)
    )
    if reason is not None:
        raise CaptureError(reason)
    given = set(aliases.tensors)
    externals = zip(first.externals, second.externals, strict=True)
    # Tensors that differ between the runs, though with equal values, are constants of the graph.
    lasting = [x for other, x in externals if x is other and x not in given]
    return second, reachable, lasting, outcome


def _compile(
    graph: GraphModule,
    inputs: Sequence[Tensor],
    backend: Backend,
    difference: Callable[[Callable[..., _Outputs]], str | None],
) -> Callable[..., _Outputs]:
    """Compile a graph, and compare its outputs with those of the programs before and after.

    :param difference: a function that returns the first difference between the outputs of a graph
        and those of the programs, or None.
    :returns: the compiled graph.
    """
    reason = difference(graph)
    if reason is not None:
        raise CaptureError(
            f"the graph gives other results than the eager step: {reason}. Check that the loss and "
            "the differentiable_loss of the ELBO agree"
        )
    compiled = compile_graph(graph, inputs, backend)
    try:
        reason = difference(compiled)
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise CompileError(f"the graph compiled by {backend.name} fails ({line})") from error
    if reason is not None:
        raise RuntimeError(
            f"CompiledSVI: the graph compiled by {backend.name} gives other results than the eager "
            f"step: {reason}. Use backend='eager', which runs the graph without compiling it."
        )
    return compiled


def _outputs(run: Callable[[], _Outputs], log: OperationLog) -> list[Any]:
    """Return the outputs for new noise, and the state of the random generator after the run."""
    with log.undone(), kept_random_states(_SEED + 3), torch.no_grad():
        outputs = [x if x is None else x.detach().clone() for x in run()]
        return [*outputs, torch.get_rng_state()]


def _difference(expected: Sequence[Any], found: Sequence[Any], names: Sequence[str]) -> str | None:
    """Return the first difference of outputs beyond rounding, or None."""
    if not torch.equal(expected[-1], found[-1]):
        return "the two draw different random numbers"
    gradients = [x for x in expected[1:-1] if x is not None]
    largest = max((_max_abs(x) for x in gradients), default=0.0)
    labels = ["the loss", *(f"the gradient of '{name}'" for name in names)]
    pairs = zip(labels, expected, found, strict=False)
    for i, (label, x, y) in enumerate(pairs):
        if x is None or y is None:
            if x is not y:
                return f"{label} exists in only one of the two"
            continue
        if i > 0 and x.dtype != y.dtype:
            return f"{label} has dtype {y.dtype}, not {x.dtype}"
        eps = torch.finfo(y.dtype).eps
        tolerance = math.sqrt(eps) * _max_abs(x) + 100 * eps * largest
        finite = x.isfinite()
        if not torch.equal(finite, y.isfinite()):
            return f"{label} is finite in only one of the two"
        difference = _max_abs((x - y)[finite])
        if difference > tolerance:
            return f"{label} differs by {difference:.3g} (largest entry: {_max_abs(x):.3g})"
    return None


def _max_abs(x: Tensor) -> float:
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0
