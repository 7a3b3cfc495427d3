"""Builds, checks and runs one captured step."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_ext._private.of_torch import pytree, storage_of
from pyro_ext._random_states import kept_random_states
from pyro_ext.infer.svi.capture.audit_times import AuditTimes
from pyro_ext.infer.svi.capture.backends import Backend, CompileError, compile_graph
from pyro_ext.infer.svi.capture.comparison import Results, coarsest, difference, rehearse
from pyro_ext.infer.svi.capture.graph import LOCK, capture, compute
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
            return [as_tensor(loss), *(params[name].grad for name in names)]
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
    """A captured step, and the conditions under which it is valid.

    :ivar graph: the graph as it was captured.
    :ivar run: the compiled graph.
    :ivar is_compiled: whether ``run`` is another function than ``graph``.
    :ivar sources: the places of the tensors that the graph reads, other than its arguments.
    :ivar written: the positions of the inputs that the graph changes in place.
    :ivar names: the parameters whose gradients the graph returns.
    :ivar tied: pairs of names of the same parameter.
    :ivar eps: the coarsest rounding error of its operations.
    :ivar checked_at: the number of steps of the SVI when the graph was last compared with the
        programs.
    :ivar audit_times: the runs after which to compare them again.
    """

    step: Step
    graph: GraphModule
    run: Callable[..., _Outputs]
    is_compiled: bool
    sources: list[TensorSource]
    written: list[int]
    names: list[str]
    tied: list[tuple[str, str]]
    reachable: ReachableState
    lifted: LiftedFloats
    log: OperationLog
    eps: float
    audit_times: AuditTimes = field(default_factory=AuditTimes)
    checked_at: int = 0

    def __call__(self, arguments: Arguments, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Return the loss, then the gradients in the order of ``names``."""
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

    def tensors_written(self, arguments: Arguments, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return those arguments and inputs that the graph changes in place."""
        tensors = [*self.lifted.lift(arguments).tensors, *inputs]
        return [tensors[index] for index in self.written]

    def rehearse(self, arguments: Arguments, inputs: Sequence[Tensor]) -> Results:
        """Return the results of a run of the graph on the next noise, and undo its effects."""
        written = self.tensors_written(arguments, inputs)
        return rehearse(lambda: self(arguments, inputs)[: len(self.names) + 1], written)

    def compare(
        self, arguments: Arguments, inputs: Sequence[Tensor], expected: Results, found: Results
    ) -> str | None:
        """Compare the results of the programs with those of the graph.

        If they differ by more than a few rounding errors, the operations of the programs are
        compared as well. Then only rounding can be the reason, unless the compiler is wrong.

        :param arguments: the arguments of the step.
        :param inputs: the other tensors that the graph reads.
        :param expected: the results of the programs.
        :param found: the results of the graph on the same noise and state.
        :returns: the difference of programs and graph; None if there is none beyond rounding.
        :raises CompileError: if only the compiled graph differs.
        """
        if difference(expected, found, self.names, self.eps, is_strict=True) is None:
            return None
        aliases = self.lifted.lift(arguments).aliases
        tensors = [*aliases.tensors, *inputs]
        written = [tensors[index] for index in self.written]
        try:
            with self.lifted.in_place(), kept_random_states(_SEED):
                now, outcome = log_operations(partial(self.step.compute, aliases))
                state = torch.get_rng_state()
        except CaptureError as error:
            return str(error)
        reason = self.log.difference(now)
        if reason is not None:
            return reason
        run = partial(self.graph, *tensors)
        plain = rehearse(lambda: run()[: len(self.names) + 1], written, _SEED)
        direct = Results(outcome.tensors, plain.written, state)
        reason = difference(direct, plain, self.names, self.eps, is_strict=True)
        if reason is not None:
            return f"{reason}, because a tensor that no name leads to has changed"
        reason = difference(expected, found, self.names, self.eps)
        if reason is None or not self.is_compiled:
            return reason
        plain = rehearse(lambda: run()[: len(self.names) + 1], written, _SEED)
        as_svi = partial(self.step.run_as_svi, arguments, self.names)
        other = difference(rehearse(as_svi, written, _SEED), plain, self.names, self.eps)
        if other is not None:
            return other
        raise CompileError(f"the compiled graph gives other results than the programs: {reason}")


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
    :raises CaptureError: if a graph would give other results than the programs, or if anything goes
        wrong during the capture.
    :raises NeedsEagerStepError: if the programs create parameters.
    :raises CompileError: if the compiler fails, or the compiled graph gives other results.
    """
    known = set(current_params())
    with LOCK:
        try:
            return _build(step, arguments, lifts, backend)
        except (CaptureError, CompileError, NeedsEagerStepError):
            raise
        except Exception as error:
            line = str(error).partition("\n")[0].rstrip(".")
            raise CaptureError(f"its capture fails with {type(error).__name__} ({line})") from error
        finally:
            for name in current_params().keys() - known:
                del pyro.get_param_store()[name]


def _build(step: Step, arguments: Arguments, lifts: bool, backend: Backend) -> CompiledStep:
    if any(tensor.requires_grad for tensor in arguments.tensors):
        raise CaptureError("an argument requires gradients. Detach it, or make it a parameter")
    if any(tensor.layout != torch.strided for tensor in arguments.tensors):
        raise CaptureError("an argument is a sparse tensor. Pass a dense tensor")
    lifted = LiftedFloats(step.objectives, lifts)
    aliases = lifted.lift(arguments).aliases
    before = find_reachable(step.roots, [*lifted.labels, _SCHEDULE])
    if before.iterators:
        raise CaptureError(
            f"the model or guide reaches the iterator '{before.iterators[0]}', which a capture "
            "would advance. Pass the values as arguments"
        )
    try:
        with lifted.in_place():
            log, reachable, externals, outcome = _log_twice(step, arguments, aliases, lifted)
            inputs = [*aliases.tensors, *externals]
            with kept_random_states(_SEED + 2), log.undone():
                graph = capture(partial(step.compute, aliases), inputs)
        names = list(outcome.gradients)
        written = _written(log, inputs)
        eps = coarsest(log.dtypes)
        as_svi = partial(step.run_as_svi, arguments, names)
        expected = rehearse(as_svi, log.originals, _SEED + 3)

        def difference_of(run: Callable[..., _Outputs]) -> str | None:
            run_on_inputs = lambda: run(*inputs)[: len(names) + 1]  # noqa: E731
            found = rehearse(run_on_inputs, log.originals, _SEED + 3)
            return difference(expected, found, names, eps)

        compiled = _compile(graph, inputs, backend, difference_of)
    finally:
        before.restore()
    params = current_params()
    return CompiledStep(
        step=step,
        graph=graph,
        run=compiled,
        is_compiled=compiled is not graph,
        sources=[find_source(tensor, params, reachable) for tensor in externals],
        written=written,
        names=names,
        tied=[
            (name, other)
            for name, param in outcome.params.items()
            for other in names
            if name != other and param is outcome.params[other]
        ],
        reachable=reachable,
        lifted=lifted,
        log=log.without_tensors(),
        eps=eps,
    )


def _written(log: OperationLog, inputs: Sequence[Tensor]) -> list[int]:
    """Return the positions of the inputs that a run changes in place."""
    storages = {storage_of(tensor) for tensor in log.originals}
    return [index for index, tensor in enumerate(inputs) if storage_of(tensor) in storages]


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
    if current_params().keys() - known:
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
    difference_of: Callable[[Callable[..., _Outputs]], str | None],
) -> Callable[..., _Outputs]:
    """Compile a graph, and compare its outputs with those of the programs before and after.

    :param difference_of: a function that returns the first difference between the outputs of a
        graph and those of the programs, or None.
    :returns: the compiled graph.
    """
    reason = difference_of(graph)
    if reason is not None:
        raise CaptureError(
            f"the graph gives other results than the eager step: {reason}. Check that the loss and "
            "the differentiable_loss of the ELBO agree"
        )
    if backend.name == "eager":
        return graph
    compiled = compile_graph(graph, inputs, backend)
    try:
        reason = difference_of(compiled)
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise CompileError(f"the graph compiled by {backend.name} fails ({line})") from error
    if reason is not None:
        raise CompileError(
            f"the graph compiled by {backend.name} gives other results than the eager step: "
            f"{reason}"
        )
    return compiled


def as_tensor(loss: Any) -> Tensor:
    """Return a loss as a tensor without dims."""
    return torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
