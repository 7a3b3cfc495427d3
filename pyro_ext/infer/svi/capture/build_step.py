"""Captures, checks and compiles a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor, strided
from torch.fx import GraphModule

from pyro_ext._private.of_torch import is_sharded, storage_of
from pyro_ext._random_states import kept_random_states
from pyro_ext.distributed.noise import active_rows
from pyro_ext.infer.kl.kl_weighted import KLWeightedELBO
from pyro_ext.infer.svi.capture.backends import Backend, CompileError, compile_graph
from pyro_ext.infer.svi.capture.comparison import aliases_of, coarsest, difference, rehearse
from pyro_ext.infer.svi.capture.compiled_step import CompiledStep
from pyro_ext.infer.svi.capture.graph_inputs import (
    Arguments,
    find_source,
    no_new_params,
)
from pyro_ext.infer.svi.capture.lifted_floats import FLOATS, LiftedFloats
from pyro_ext.infer.svi.capture.operation_log import OperationLog, Outcome, log_operations
from pyro_ext.infer.svi.capture.reachable_search import find_reachable
from pyro_ext.infer.svi.capture.reachable_state import Place, ReachableState
from pyro_ext.infer.svi.capture.recorder import CaptureError, GraphRecorder
from pyro_ext.infer.svi.capture.report import GraphRecord
from pyro_ext.infer.svi.capture.step import Outputs, Step, autocast_devices, without_autocast
from pyro_ext.infer.svi.capture.value_checks import LOCK

Run = Callable[..., Outputs]

_SEED = 20_090_911
#: The factor of a KL schedule is an input of the graph, and its objective counts losses.
_OF_KL_WEIGHTED = ("schedule", "_num_losses", "_step_of_losses", "_has_warned")


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
    with LOCK, no_new_params():
        try:
            return _build(step, arguments, lifts, backend)
        except (CaptureError, CompileError, NeedsEagerStepError):
            raise
        except Exception as error:
            line = str(error).partition("\n")[0].rstrip(".")
            raise CaptureError(f"its capture fails with {type(error).__name__} ({line})") from error


class _Runs(NamedTuple):
    """The graph as it was captured, and the compiled graph."""

    plain: Run
    compiled: Run
    num_kernels: int | None = None
    compile_seconds: float = 0.0

    def record(self, has_gradients: bool, graph: GraphModule, seconds: float) -> GraphRecord:
        """Return the record of a graph, whose capture and compilation took a time."""
        return GraphRecord(
            step=0,
            has_gradients=has_gradients,
            num_operations=sum(node.op == "call_function" for node in graph.graph.nodes),
            num_kernels=self.num_kernels,
            capture_seconds=seconds - self.compile_seconds,
            compile_seconds=self.compile_seconds,
        )


def _check_tensors(step: Step, arguments: Arguments) -> None:
    """Check that a graph can read the arguments and parameters."""
    if any(tensor.requires_grad for tensor in arguments.tensors):
        raise CaptureError("an argument requires gradients. Detach it, or make it a parameter")
    if any(tensor.layout != strided for tensor in arguments.tensors):
        raise CaptureError("an argument is a sparse tensor. Pass a dense tensor")
    for name, param in step.params().items():
        if is_sharded(param):
            raise CaptureError(
                f"parameter '{name}' is sharded, and a graph cannot gather its parts. With "
                "fully_shard, wrap only the compiled module, and no layer in it"
            )


def _build(step: Step, arguments: Arguments, lifts: bool, backend: Backend) -> CompiledStep:
    started = perf_counter()
    _check_tensors(step, arguments)
    lifted = LiftedFloats(step.objectives, lifts)
    aliases = lifted.lift(arguments).aliases
    ignored = lifted.places
    if isinstance(step.objective, KLWeightedELBO):
        ignored += [Place(vars(step.objective), key, key) for key in _OF_KL_WEIGHTED]
    before = find_reachable(step.roots, ignored, keeps_large=True)
    if before.iterators:
        raise CaptureError(
            f"the model or guide reaches the iterator '{before.iterators[0]}', which a capture "
            "would advance. Pass the values as arguments"
        )
    try:
        with lifted.in_place():
            log, roots, reachable, externals, outcome, recorder = _log_twice(
                step, arguments, aliases, lifted, ignored, before
            )
            inputs = [*aliases.tensors, *externals]
            graph, data = recorder.finish([*outcome.tensors, *outcome.kept], inputs)
            if data is not None:
                data.graph = _outside_of_autocast(data.graph)
                inputs += data.start(inputs)
        names, eps = list(outcome.gradients), coarsest(log.dtypes)
        written = _written(log, inputs)
        eagerly = partial(step.run_eagerly, arguments, names)
        expected = rehearse(eagerly, len(names), log.originals, _SEED + 3)

        def difference_of(run: Run) -> str | None:
            of_run = partial(run, *aliases_of(inputs))
            results = rehearse(of_run, len(names), log.originals, _SEED + 3)
            return difference(expected, results, names, eps)

        runs = _compile(graph, inputs, recorder.draws, backend, difference_of)
    finally:
        before.restore()
    params = step.params()
    return CompiledStep(
        step=step,
        graph=runs.plain,
        data=data,
        run=runs.compiled,
        sources=[find_source(tensor, params, reachable) for tensor in externals],
        written=written,
        names=names,
        tied=_tied(outcome.params, names),
        rows=active_rows(),
        own=step.own_params(),
        reachable=reachable,
        lifted=lifted,
        log=log.without_tensors(),
        roots=roots,
        ignored=ignored,
        record=runs.record(step.has_gradients, graph, perf_counter() - started),
        eps=eps,
        reuses_memory=backend.reuses_memory,
    )


def _tied(params: dict[str, Tensor], names: list[str]) -> list[tuple[str, str]]:
    """Return pairs of names of the same parameter."""
    return [
        (name, other)
        for name, param in params.items()
        for other in names
        if name != other and param is params.get(other)
    ]


def _written(log: OperationLog, inputs: Sequence[Tensor]) -> list[int]:
    """Return the positions of the inputs that a run changes in place."""
    storages = {storage_of(tensor) for tensor in log.originals}
    return [index for index, tensor in enumerate(inputs) if storage_of(tensor) in storages]


def _log_twice(
    step: Step,
    arguments: Arguments,
    aliases: Arguments,
    lifted: LiftedFloats,
    ignored: list[Place],
    before: ReachableState,
) -> tuple[
    OperationLog, list[tuple[str, Any]], ReachableState, list[Tensor], Outcome, GraphRecorder
]:
    """Log two runs with different random numbers, and check that their operations are the same.

    :returns: the log of the second run, the objects from which other values are reachable, these
        values, the external tensors, and the outcome and the recorder of the second run.
    :raises CaptureError: if the runs differ, or if the programs change values that they reach.
    :raises NeedsEagerStepError: if the programs create parameters.
    """
    known = set(step.params())
    # Other views, so that an argument that a run leaves in an attribute is another tensor, too.
    others = aliases.aliases
    with kept_random_states(_SEED):
        first, *_ = log_operations(partial(step.compute, others), others.tensors)
    if step.params().keys() - known:
        raise NeedsEagerStepError
    opaque = [("argument", leaf) for leaf in aliases.leaves if not isinstance(leaf, Tensor)]
    modules = [(type(module).__name__, module) for module in first.modules]
    roots = [*step.roots, *opaque, *modules]
    reachable = find_reachable(roots, ignored, keeps_large=True)
    floats = [
        alias
        for alias, leaf in zip(aliases.leaves, arguments.leaves, strict=True)
        if isinstance(alias, Tensor) and type(leaf) in FLOATS
    ]
    with kept_random_states(_SEED + 1), lifted.nudged(floats):
        second, outcome, recorder = log_operations(partial(step.compute, aliases), aliases.tensors)
    is_kept = _can_be_kept(step, recorder, set(second.externals), lifted, floats, before)
    outcome = replace(outcome, kept=reachable.keep(is_kept))
    changed = reachable.changed_by_programs()
    reachable.large.clear()
    if changed is not None:
        raise CaptureError(
            f"the model or guide changes '{changed}' when it runs. Change it outside of them"
        )
    if first.difference(second) is not None:
        # Programs may initialise themselves in a first run, for example by counting plates.
        with kept_random_states(_SEED):
            first, *_ = log_operations(partial(step.compute, others), others.tensors)
    reason = first.difference(second) or first.difference_of_externals(second, recorder.given)
    if reason is not None:
        raise CaptureError(reason)
    _check_gradients(step, second)
    externals = zip(first.externals, second.externals, strict=True)
    # Tensors that differ between the runs, though with equal values, are constants of the graph.
    lasting = [x for other, x in externals if x is other]
    return second, roots, reachable, lasting, outcome, recorder


def _can_be_kept(
    step: Step,
    recorder: GraphRecorder,
    read: set[Tensor],
    lifted: LiftedFloats,
    floats: list[Tensor],
    before: ReachableState,
) -> Callable[[Place, Tensor, Any], bool]:
    """Return a function that tells whether a graph can leave a tensor at a place.

    :param read: the tensors that the programs read.
    :param floats: the tensors in place of floats among the arguments.
    """
    # In place of lifted floats, the programs leave tensors where they otherwise leave floats.
    has_tensors = not (floats or lifted.attributes)
    known = {(id(place.holder), place.key) for place, _ in before.tensors}

    def is_kept(place: Place, tensor: Tensor, now: Any) -> bool:
        was_tensor = has_tensors or (id(place.holder), place.key) in known
        return was_tensor and step.keeps(now, recorder) and tensor not in read

    return is_kept


def _check_gradients(step: Step, log: OperationLog) -> None:
    """Raise an error if a tensor needs a gradient that the graph would not return."""
    params = set(step.params().values())
    for tensor in log.used if step.has_gradients else ():
        if tensor.requires_grad and tensor not in params:
            raise CaptureError(
                f"a tensor of shape {tuple(tensor.shape)} requires gradients, but is not in the "
                "param store. Register it with pyro.module or pyro.param, or detach it"
            )


def _compile(
    graph: GraphModule,
    inputs: Sequence[Tensor],
    draws: Sequence[Callable[[], Tensor]],
    backend: Backend,
    difference_of: Callable[[Run], str | None],
) -> _Runs:
    """Compile a graph, and compare its outputs with those of the programs before and after.

    :param draws: the functions that make the last inputs of the graph.
    :param difference_of: a function that returns the first difference between the outputs of a
        graph and those of the programs, or None.
    """
    plain = _with_draws(_outside_of_autocast(graph), draws)
    reason = difference_of(plain)
    if reason is not None:
        advice = (
            "Draw them outside of blocks that set the seed or run again"
            if "random numbers" in reason
            else "Check that the loss and the differentiable_loss of the ELBO agree"
        )
        raise CaptureError(f"the graph gives other results than the eager step: {reason}. {advice}")
    if backend.name == "eager":
        return _Runs(plain, plain)
    started = perf_counter()
    with without_autocast():
        compiled = compile_graph(graph, [*inputs, *(draw() for draw in draws)], backend)
    runs = _Runs(
        plain,
        _with_draws(_outside_of_autocast(compiled.run), draws),
        compiled.num_kernels,
        perf_counter() - started,
    )
    try:
        reason = difference_of(runs.compiled)
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise CompileError(f"the graph compiled by {backend.name} fails ({line})") from error
    if reason is not None:
        raise CompileError(
            f"the graph compiled by {backend.name} gives other results than the eager step: "
            f"{reason}"
        )
    return runs


def _with_draws(run: Run, draws: Sequence[Callable[[], Tensor]]) -> Run:
    """Return a graph that makes the draws that are its last inputs."""
    return (lambda *tensors: run(*tensors, *(draw() for draw in draws))) if draws else run


def _outside_of_autocast(run: Run) -> Run:
    """Return a graph that runs without autocast, because it holds all casts already."""
    if not autocast_devices():
        return run

    def call(*tensors: Tensor) -> Outputs:
        with without_autocast():
            return run(*tensors)

    return call
