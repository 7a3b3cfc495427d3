"""A captured step: runs it, and compares it with the programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_ext._private.of_torch import storage_of
from pyro_ext._random_states import kept_random_states
from pyro_ext.infer.svi.capture.audit_times import AuditTimes
from pyro_ext.infer.svi.capture.backends import CompileError
from pyro_ext.infer.svi.capture.comparison import Results, aliases_of, difference, rehearse
from pyro_ext.infer.svi.capture.data_program import DataProgram
from pyro_ext.infer.svi.capture.graph_inputs import (
    Arguments,
    OwnParams,
    TensorSource,
    current_params,
    no_new_params,
)
from pyro_ext.infer.svi.capture.lifted_floats import LiftedFloats
from pyro_ext.infer.svi.capture.operation_log import OperationLog, log_operations
from pyro_ext.infer.svi.capture.reachable_search import find_reachable
from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState
from pyro_ext.infer.svi.capture.recorder import CaptureError
from pyro_ext.infer.svi.capture.report import GraphRecord
from pyro_ext.infer.svi.capture.step import Context, Outputs, Step, current_context

_SEED = 20_090_911


class UnverifiableError(Exception):
    """An error for a graph whose last step cannot be repeated."""


@dataclass(eq=False)
class CompiledStep:
    """A captured step, and the conditions under which it is valid.

    :ivar graph: the graph as it was captured.
    :ivar data: the program that computes what the graph needs from data alone, or None.
    :ivar run: the compiled graph.
    :ivar sources: the places of the tensors that the graph reads, other than its arguments.
    :ivar written: the positions of the inputs that the graph changes in place.
    :ivar names: the parameters whose gradients the graph returns.
    :ivar tied: pairs of names of the same parameter.
    :ivar rows: the numbers of rows in plates that are divided over processes.
    :ivar own: the places of the parameters that may be outside of the param store.
    :ivar roots: the objects from which ``reachable`` was found, with their names.
    :ivar ignored: the places of values that are inputs of the graph.
    :ivar record: its cost, and the step at which it was captured.
    :ivar eps: the coarsest rounding error of its operations.
    :ivar reuses_memory: whether a run on a GPU overwrites the outputs of the run before.
    :ivar num_runs: the number of steps that ran it.
    :ivar checked_at: the number of steps of the loop when the graph was last compared with the
        programs.
    :ivar last_used_at: the number of the last step that it took.
    :ivar last_arguments: the arguments of that step.
    :ivar context: the modes of torch around it.
    :ivar audit_times: the runs after which to compare them again.
    """

    step: Step
    graph: Callable[..., Outputs]
    data: DataProgram | None
    run: Callable[..., Outputs]
    sources: list[TensorSource]
    written: list[int]
    names: list[str]
    tied: list[tuple[str, str]]
    rows: list[int]
    own: OwnParams
    reachable: ReachableState
    lifted: LiftedFloats
    log: OperationLog
    roots: list[tuple[str, Any]]
    ignored: list[Place]
    record: GraphRecord
    eps: float
    reuses_memory: bool
    audit_times: AuditTimes = field(default_factory=AuditTimes)
    num_runs: int = 0
    checked_at: int = 0
    last_used_at: int = 0
    last_arguments: Arguments | None = None
    context: Context = field(default_factory=current_context)

    def __call__(self, arguments: Arguments, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Return the loss, then the gradients in the order of ``names``."""
        self.lifted.update()
        tensors = [*self.lifted.lift(arguments).tensors, *inputs]
        with torch.no_grad():
            outputs = self.run(*tensors)
        if self.reachable.kept:
            of_inputs = {storage_of(x) for x in tensors}
            found: Sequence[Any] = outputs[1 + len(self.names) :]
            for place, value in zip(self.reachable.kept, found, strict=False):
                # A CUDA graph would be recorded again while a result of its last run is alive.
                is_reused = self.reuses_memory and value.is_cuda
                is_copied = is_reused and storage_of(value) not in of_inputs
                place.put_back(value.clone() if is_copied else value)
        return outputs

    def params(self) -> dict[str, Tensor]:
        """Return the parameters that may get gradients now, by name."""
        return current_params(self.own)

    def inputs(self, params: dict[str, Tensor], arguments: Arguments) -> list[Tensor] | None:
        """Return the current tensors that the graph reads, other than its arguments.

        :param params: the parameters by name.
        :param arguments: the arguments of the step.
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
        if self.data is None:
            return found
        self.lifted.update()
        moved = self.data([*self.lifted.lift(arguments).tensors, *found])
        return None if moved is None else found + moved

    def tensors_written(self, arguments: Arguments, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return those arguments and inputs that the graph changes in place."""
        tensors = [*self.lifted.lift(arguments).tensors, *inputs]
        return [tensors[index] for index in self.written]

    def rehearse(self, arguments: Arguments, inputs: Sequence[Tensor]) -> Results:
        """Return the results of a run of the graph on the next noise, and undo its effects."""
        written = self.tensors_written(arguments, inputs)
        return rehearse(partial(self, arguments, aliases_of(inputs)), len(self.names), written)

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
        reason = self.verify(arguments, inputs)
        return difference(expected, found, self.names, self.eps) if reason is None else reason

    def verify(self, arguments: Arguments, inputs: Sequence[Tensor]) -> str | None:
        """Compare the programs with the graph, in runs that have no effects on tensors.

        :param arguments: the arguments of the step.
        :param inputs: the other tensors that the graph reads.
        :returns: the difference of programs and graph; None if there is none beyond rounding.
        :raises CompileError: if only the compiled graph differs.
        """
        with self.reachable.without_effect_on_kept():
            return self._verify(arguments, inputs)

    def _verify(self, arguments: Arguments, inputs: Sequence[Tensor]) -> str | None:
        aliases = self.lifted.lift(arguments).aliases
        tensors = [*aliases.tensors, *inputs]
        written = [tensors[index] for index in self.written]
        try:
            with no_new_params(), self.lifted.in_place(), kept_random_states(_SEED):
                run = partial(self.step.compute, aliases)
                now, outcome, _ = log_operations(run, aliases.tensors)
                state = torch.get_rng_state()
        except CaptureError as error:
            return str(error)
        reason = self.log.difference(now)
        if reason is not None:
            return reason

        def of(run: Callable[..., Outputs], *args: Any) -> Results:
            return rehearse(partial(run, *args), len(self.names), written, _SEED)

        tensors = aliases_of(tensors)
        plain = of(self.graph, *tensors)
        direct = Results(outcome.tensors, plain.written, state)
        reason = difference(direct, plain, self.names, self.eps, is_strict=True)
        if reason is not None:
            return f"{reason}, because a tensor that no name leads to has changed"
        expected = of(self.step.run_eagerly, arguments, self.names)
        reason = difference(expected, plain, self.names, self.eps)
        if reason is None and self.run is not self.graph:
            of_compiler = difference(expected, of(self.run, *tensors), self.names, self.eps)
            if of_compiler is not None:
                raise CompileError(
                    f"the compiled graph gives other results than the programs: {of_compiler}"
                )
        return reason

    def verify_again(self) -> str | None:
        """Verify the graph with the arguments, handlers and modes of its last step.

        If values have changed, they are put back in the meantime, so that only other changes count.

        :returns: the difference of programs and graph; None if there is none.
        :raises UnverifiableError: if the state of the last step cannot be put back.
        :raises CompileError: if only the compiled graph differs.
        """
        if self.last_arguments is None:
            return None
        with self.step.in_context(self.context):
            if self.reachable.changed() is None:
                return self._verify_with(self.last_arguments)
            try:
                present = find_reachable(self.roots, self.ignored)
            except CaptureError as error:  # there are too many values now
                raise UnverifiableError from error
            if self.reachable.has_other_entries:
                raise UnverifiableError
            try:
                self.reachable.restore()
                if self.reachable.changed() is not None:
                    raise UnverifiableError
                return self._verify_with(self.last_arguments)
            finally:
                present.restore()

    def _verify_with(self, arguments: Arguments) -> str | None:
        inputs = self.inputs(self.params(), arguments)
        if inputs is None:
            raise UnverifiableError
        return self.verify(arguments, inputs)
