"""Keeps the graphs of steps, finds the one for a step, and gives up where there is none."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor

from pyro_ext._private.of_torch import global_hooks, is_forked
from pyro_ext.infer.svi.capture.argument_keys import SameObject, describe_handler, describe_leaf
from pyro_ext.infer.svi.capture.audit_times import AuditTimes
from pyro_ext.infer.svi.capture.backends import Backend, CompileError
from pyro_ext.infer.svi.capture.build_step import NeedsEagerStepError, build_step
from pyro_ext.infer.svi.capture.comparison import Results
from pyro_ext.infer.svi.capture.compiled_step import CompiledStep, UnverifiableError
from pyro_ext.infer.svi.capture.graph_inputs import Arguments
from pyro_ext.infer.svi.capture.operation_log import CaptureError
from pyro_ext.infer.svi.capture.report import GraphRecord
from pyro_ext.infer.svi.capture.step import Step, current_context

_WITHOUT_COMPILER = "runs graphs without compiling them"
#: The number of steps after which a graph that is not used makes room for another one.
_NUM_IDLE = 1000


class ReadyGraph(NamedTuple):
    """A graph with the inputs of one step."""

    graph: CompiledStep
    params: dict[str, Tensor]
    arguments: Arguments
    inputs: list[Tensor]

    @property
    def names(self) -> list[str]:
        """The names of the parameters whose gradients the graph returns."""
        return self.graph.names

    def named(
        self, gradients: Iterable[Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Return these parameters and their gradients by name."""
        params = {name: self.params[name] for name in self.names}
        return params, dict(zip(params, gradients, strict=False))


class Graphs:
    """The graphs of a training loop.

    :param backend: the settings for compiling.
    :param max_graphs: the largest number of graphs.
    :param compile_after: the number of steps with the same key before a capture.
    :param audit_every: the largest number of runs of a graph from one audit to the next.
    :param report: a function that is told why a step has no graph: the reason, the error behind it,
        and what happens instead of a compiled step.
    :param announce: a function that is told when a capture begins (True), and when it ends.
    :param note: a function that is told what has been captured and evicted.
    """

    def __init__(
        self,
        backend: Backend,
        max_graphs: int,
        compile_after: int,
        audit_every: int,
        report: Callable[..., None],
        announce: Callable[[bool], None],
        note: Callable[[str], None],
    ) -> None:
        self.backend = backend
        self.max_graphs = max_graphs
        self.compile_after = compile_after
        self.audit_every = audit_every
        self.report = report
        self.announce = announce
        self.note = note
        self._by_key: dict[Any, list[CompiledStep]] = {}
        #: Reasons why steps have no graph: all with or without gradients, or those with a key.
        self._given_up: dict[bool, str] = {}
        self._refused: dict[Any, str] = {}
        #: How often steps without a graph came, by the hash of their key.
        self._num_seen: Counter[int] = Counter()
        self._lifts = True
        self._num_built = 0

    @property
    def count(self) -> int:
        """The number of graphs."""
        return sum(map(len, self._by_key.values()))

    @property
    def records(self) -> list[GraphRecord]:
        """The graphs, with their cost and use."""
        return [
            graph.record._replace(num_runs=graph.num_runs, last_used_at=graph.last_used_at)
            for graphs in self._by_key.values()
            for graph in graphs
        ]

    def find(
        self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], num_steps: int
    ) -> ReadyGraph | None:
        """Return the graph for a step, or None for an eager step.

        If there is no such graph yet, capture one.

        :param step: the step.
        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :param num_steps: the number of steps of the loop so far.
        """
        if step.has_gradients in self._given_up:
            self.report(self._given_up[step.has_gradients])
            return None
        if self._by_key and self.backend.name == "inductor" and is_forked():
            self._stop_compiling("this process was forked after a compilation")
        refusal = step.refusal()
        if refusal is not None:
            self.report(refusal)
            return None
        arguments = Arguments.of(args, kwargs)
        key = self._key(step, arguments)
        known = self._by_key.get(key, [])
        reason = ""
        for graph in known:
            changed = graph.reachable.changed()
            params = graph.params()
            inputs = graph.inputs(params, arguments) if changed is None else None
            if inputs is not None:
                graph.last_used_at, graph.last_arguments = num_steps + 1, arguments
                return ReadyGraph(graph, params, arguments, inputs)
            reason = (
                "a tensor has another shape, dtype or device, or the programs read another number "
                "out of their data"
                if changed is None
                else f"'{changed}' has another value"
            )
        if key in self._refused:
            self.report(self._refused[key])
            return None
        if not known:
            self._num_seen[hash(key)] += 1
            if self._num_seen[hash(key)] <= self.compile_after:
                return None
        if not self._has_room(num_steps):
            self.report(
                f"there are max_graphs={self.max_graphs} graphs, and now "
                f"{reason or self._reason(key, arguments)}. Set max_graphs higher, or change fewer "
                "values between steps"
            )
            return None
        if not self.audit(known, num_steps + 1):  # because no later audit of these is certain
            return None
        built = self._build(step, arguments)
        if built is None:
            return None
        built.checked_at, built.last_used_at = num_steps, num_steps + 1
        built.record = built.record._replace(step=num_steps)
        self.note(f"captured a graph: {built.record}")
        built.last_arguments = arguments
        # The key is another one if floats are no inputs any more.
        self._by_key.setdefault(self._key(step, arguments), []).append(built)
        params = built.params()
        inputs = built.inputs(params, arguments)
        return None if inputs is None else ReadyGraph(built, params, arguments, inputs)

    def _key(self, step: Step, arguments: Arguments) -> tuple[Any, ...]:
        objects = step.objective, step.model, step.guide, *global_hooks()
        return (
            step.has_gradients,
            str(arguments.spec),  # older versions of torch cannot hash a spec
            *(describe_leaf(leaf, self._lifts) for leaf in arguments.leaves),
            *map(SameObject, objects),
            *map(describe_handler, step.handlers),
            current_context(),
        )

    def _has_room(self, num_steps: int) -> bool:
        """Return whether there is room for a graph, if need be after an eviction."""
        if self.count < self.max_graphs:
            return True
        graphs = [(graph, key) for key, of_key in self._by_key.items() for graph in of_key]
        oldest, key = min(graphs, key=lambda entry: entry[0].last_used_at)
        if num_steps - oldest.last_used_at < _NUM_IDLE or not self.audit([oldest], num_steps + 1):
            return False
        self._by_key[key].remove(oldest)
        if not self._by_key[key]:
            del self._by_key[key]
        self.note(
            f"evicted the graph of step {oldest.record.step}, last used at {oldest.last_used_at}"
        )
        return True

    def _reason(self, key: tuple[Any, ...], arguments: Arguments) -> str:
        """Return why a step needs a graph of its own, if all graphs are for other arguments."""
        named = zip(arguments.names, arguments.leaves, strict=True)
        for i, (name, leaf) in enumerate(named, start=2):  # after the first two entries of a key
            if all(key[i : i + 1] != known[i : i + 1] for known in self._by_key):
                kind = "shape, dtype or device" if isinstance(leaf, Tensor) else "value"
                return f"{name} has another {kind} than in earlier steps"
        return "the arguments differ in shape, dtype or value"

    def _build(self, step: Step, arguments: Arguments) -> CompiledStep | None:
        """Capture a graph, or return None for an eager step."""
        try:
            self.announce(True)
            built = build_step(step, arguments, self._lifts, self.backend)
        except NeedsEagerStepError:
            return None
        except CompileError as error:
            self._stop_compiling(str(error), error)
            return self._build(step, arguments)
        except CaptureError as error:
            if self._lifts:
                # Perhaps the programs branch on a float. Then it cannot be an input of the graph.
                self._lifts = False
                return self._build(step, arguments)
            self._refused[self._key(step, arguments)] = str(error)
            if len(self._refused) >= self.max_graphs:
                self._given_up[step.has_gradients] = str(error)
            self.report(str(error), error)
            return None
        finally:
            self.announce(False)
        built.audit_times = AuditTimes(self.audit_every, self._num_built)
        self._num_built += 1
        return built

    def passes_audit(
        self,
        ready: ReadyGraph,
        expected: Results,
        found: Results,
        used: Iterable[str] | None,
        step: int,
    ) -> bool:
        """Compare the results of the programs with those of a graph, and give up if they differ.

        :param ready: the graph, with its inputs.
        :param expected: the results of the programs.
        :param found: the results of the graph.
        :param used: the names of the parameters that the programs use; None if it is not known.
        :param step: the number of this step.
        :returns: whether the results are equal up to rounding.
        """
        graph = ready.graph
        late = set(graph.log.param_names) ^ set(used) if used is not None else ()

        def compare() -> str | None:
            if late:
                return f"parameter '{min(late)}' is used in only one of two runs of the same step"
            return graph.compare(ready.arguments, ready.inputs, expected, found)

        return self._is_right(graph, compare, step)

    def audit(self, graphs: Iterable[CompiledStep] | None, step: int) -> bool:
        """Audit graphs that have taken steps since their last audits.

        :param graphs: the graphs. None stands for all.
        :param step: the number of this step.
        :returns: whether their results are those of the programs.
        """
        if graphs is None:
            graphs = itertools.chain.from_iterable(list(self._by_key.values()))
        late = [graph for graph in graphs if graph.checked_at < graph.last_used_at]
        return all(self._is_right(graph, graph.verify_again, step) for graph in late)

    def forget_arguments(self) -> None:
        """Keep no arguments for later audits."""
        for graph in itertools.chain.from_iterable(self._by_key.values()):
            graph.last_arguments = None

    def _is_right(self, graph: CompiledStep, audit: Callable[[], str | None], step: int) -> bool:
        """Audit a graph at a step, and give up if it differs from the programs."""
        suspect = f"The results of the steps after step {graph.checked_at} are suspect"
        try:
            reason = audit()
        except CompileError as error:
            self._stop_compiling(f"an audit at step {step} found that {error}. {suspect}", error)
            return False
        except UnverifiableError:
            return True
        except Exception as error:
            reason = f"a run of the programs raises {type(error).__name__} ({error})"
        if reason is not None:
            reason = (
                f"an audit at step {step} found a change that no comparison of values shows: "
                f"{reason}. {suspect}"
            )
            self._given_up[graph.step.has_gradients] = reason
            self._by_key.clear()
            self.report(reason)
            return False
        graph.checked_at = step
        return True

    def _stop_compiling(self, reason: str, error: Exception | None = None) -> None:
        self.backend = Backend("eager", self.backend.mode)
        self._by_key.clear()
        self.report(reason, error, _WITHOUT_COMPILER)
