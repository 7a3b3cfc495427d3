"""What all fronts of compiled steps share: settings, graphs, warnings and audits."""

import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext._arguments import check_integer, describe
from pyro_ext.infer.svi.capture.backends import MODES, Backend
from pyro_ext.infer.svi.capture.comparison import Results
from pyro_ext.infer.svi.capture.graph_inputs import Arguments
from pyro_ext.infer.svi.capture.graphs import Graphs, ReadyGraph
from pyro_ext.infer.svi.capture.report import CaptureReport
from pyro_ext.infer.svi.capture.step import Step


class Settings(NamedTuple):
    """The settings of a front; see :class:`CompiledSVI`."""

    backend: Backend
    fallback: bool
    max_graphs: int
    compile_after: int
    audit_every: int

    @staticmethod
    def checked(
        owner: str,
        backend: str,
        mode: str,
        fallback: bool,
        max_graphs: int,
        compile_after: int,
        audit_every: int,
    ) -> "Settings":
        """Return the settings, after checks of the arguments of a front."""
        if backend not in ("inductor", "eager"):
            raise ValueError(
                f"{owner}: backend must be 'inductor' or 'eager', but it is {describe(backend)}."
            )
        if mode not in MODES:
            raise ValueError(
                f"{owner}: mode must be one of {', '.join(map(repr, MODES))}, but it is "
                f"{describe(mode)}."
            )
        check_integer(owner, "max_graphs", max_graphs, 1)
        check_integer(owner, "compile_after", compile_after, 0)
        check_integer(owner, "audit_every", audit_every, 1)
        return Settings(Backend(backend, mode), fallback, max_graphs, compile_after, audit_every)

    @staticmethod
    def of_compile(owner: str, compile: bool | str, compile_after: int = 0) -> "Settings | None":
        """Return the settings for the argument ``compile`` of a function; None without graphs.

        :param owner: the name of the function.
        :param compile: True, False, or ``"eager"`` for graphs that are not compiled.
        :param compile_after: see :class:`CompiledSVI`.
        """
        if compile is False:
            return None
        if compile is not True and compile != "eager":
            raise ValueError(
                f"{owner}: compile must be True, False or 'eager', but it is {describe(compile)}."
            )
        backend = "inductor" if compile is True else "eager"
        return Settings.checked(owner, backend, "default", True, 8, compile_after, 5000)


class Front:
    """A base class of objects that take compiled steps.

    A subclass calls :meth:`_set_up`, finds the graph of each step with :meth:`_find`, and counts
    its steps in ``_num_steps``.
    """

    #: The name of the front in messages.
    _front: str

    def _set_up(self, settings: Settings) -> None:
        self.backend, self.fallback, self.max_graphs, self.compile_after, self.audit_every = (
            settings
        )
        self._num_steps = self._num_eager_steps = 0
        self._events: list[tuple[int, str]] = []
        self._warned: set[str] = set()
        self._graphs = self._no_graphs()

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._graphs = self._no_graphs()

    def _no_graphs(self) -> Graphs:
        options = self.backend, self.max_graphs, self.compile_after, self.audit_every
        return Graphs(*options, self._do_without, self._announce, self._note)

    def _note(self, event: str) -> None:
        self._events.append((self._num_steps, event))

    def _count(self, num_eager: int) -> None:
        """Count a step, and whether it was eager."""
        self._num_steps += 1
        self._num_eager_steps += num_eager

    def capture_report(self) -> CaptureReport:
        """Return the graphs, their cost, and the reasons for eager steps.

        Print it to read it.
        """
        return CaptureReport(
            graphs=self._graphs.records,
            max_graphs=self.max_graphs,
            num_steps=self._num_steps,
            num_eager_steps=self._num_eager_steps,
            events=list(self._events),
        )

    def _announce(self, is_capturing: bool) -> None:
        """Show whether a step is being captured and compiled."""

    def audit(self) -> None:
        """Compare the graphs that have taken steps since their last audits with the programs.

        Call it after the last step of a loop of your own. ``CompiledSVI.run`` calls it at its end.
        It warns of steps whose results are suspect.

        :raises RuntimeError: if an audit fails and ``fallback`` is False.
        """
        self._graphs.audit(None, self._num_steps)

    def _find(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ReadyGraph | None:
        """Return the graph of a step, or None for an eager step."""
        return self._graphs.find(step, args, kwargs, self._num_steps)

    def _try(self, run: Callable[[Arguments, list[Tensor]], Any], ready: ReadyGraph) -> Any:
        """Return the outputs of a graph, or None if it raises an error.

        The programs may handle the error, so the step is then taken by Pyro.
        """
        state = torch.get_rng_state()
        ready.graph.num_runs += 1
        try:
            return run(ready.arguments, ready.inputs)
        except Exception as error:
            torch.set_rng_state(state)
            line = str(error).partition("\n")[0].rstrip(".")
            self._do_without(
                f"the graph raises {type(error).__name__} ({line}), which the programs may handle",
                error,
                "takes an eager step",
            )
            return None

    def _passes(
        self,
        ready: ReadyGraph,
        tensors: list[Tensor | None],
        found: Results,
        used: Iterable[str] | None = None,
    ) -> bool:
        """Compare the results of the programs with those of the graph, and give up if they differ.

        :param ready: the graph, with its inputs.
        :param tensors: the loss and the gradients of the programs, after their step.
        :param found: the results of the graph before it.
        :param used: the names of the parameters that the programs use; None if it is not known.
        :returns: whether they are equal up to rounding.
        """
        written = ready.graph.tensors_written(ready.arguments, ready.inputs)
        after = [x.detach().clone() for x in written]
        expected = Results(tensors, after, torch.get_rng_state())
        if not self._graphs.passes_audit(ready, expected, found, used, self._num_steps + 1):
            return False
        # The results do not depend on the time of an audit, not even by rounding.
        for tensor, value in zip(written, found.written, strict=True):
            tensor.data.copy_(value)
        return True

    def _do_without(
        self, reason: str, cause: Exception | None = None, instead: str = "takes eager steps"
    ) -> None:
        if not self.fallback:
            raise RuntimeError(
                f"{self._front} cannot compile this step: {reason}. With fallback=True, it warns "
                "instead and goes on without a compiled graph."
            ) from cause
        if reason not in self._warned:
            self._warned.add(reason)
            self._note(f"{instead}: {reason}")
            warnings.warn(f"{self._front} {instead}: {reason}.", stacklevel=4)


def held_level(objective: Any) -> AbstractContextManager[None]:
    """Keep the random number of particles of a multilevel estimate for one step."""
    return getattr(objective, "held_level", nullcontext)()
