"""Gradients of annealed densities from a compiled graph."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_ext.infer.annealing.slopes import slopes_at
from pyro_ext.infer.annealing.unconstrained import Densities, UnconstrainedPrograms
from pyro_ext.infer.svi.capture.front import Front, Settings
from pyro_ext.infer.svi.capture.function_step import FunctionStep, Values


class Slopes(Protocol):
    """A function with the arguments and results of :func:`slopes_at`."""

    def __call__(
        self, programs: UnconstrainedPrograms, positions: dict[str, Tensor], beta: float | Tensor
    ) -> tuple[Densities, dict[str, Tensor]]: ...


def chosen_slopes(owner: str, compile: bool | str) -> Slopes:
    """Return :func:`slopes_at`, or an object with the same results from compiled graphs.

    :param owner: the name of the algorithm, for messages.
    :param compile: the argument of the algorithm.
    :raises ValueError: if ``compile`` is out of range.
    """
    settings = Settings.of_compile(owner, compile)
    return slopes_at if settings is None else CompiledSlopes(owner, settings)


class _Function:
    """The densities and slopes as a function of positions, temperature and arguments."""

    def __init__(self, programs: UnconstrainedPrograms) -> None:
        self.programs = programs

    def __call__(
        self,
        model: Any,
        guide: Any,
        positions: dict[str, Tensor],
        beta: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Values:
        programs = self.programs.with_arguments(args, kwargs)
        return _values(*slopes_at(programs, positions, beta))


def _values(densities: Densities, slopes: dict[str, Tensor]) -> Values:
    return Values(torch.stack(densities), slopes)


class CompiledSlopes(Front):
    """The function :func:`slopes_at` as a compiled graph, under the contract of CompiledSVI.

    Positions, temperatures and the arguments of the programs are inputs of the graph. Where there
    is no graph, it calls :func:`slopes_at`, with one warning.

    :param owner: the name of the algorithm, for messages.
    :param settings: the settings of the graphs.
    """

    def __init__(self, owner: str, settings: Settings) -> None:
        self._front = owner
        self._set_up(settings)
        self._function: _Function | None = None

    def __call__(
        self, programs: UnconstrainedPrograms, positions: dict[str, Tensor], beta: float | Tensor
    ) -> tuple[Densities, dict[str, Tensor]]:
        """Return what :func:`slopes_at` returns."""
        if self._function is None or self._function.programs is not programs:
            self._function = _Function(programs)
        pair = programs.programs
        # A graph is bound to the strides of its inputs, and a plain number would be a constant.
        inputs = {
            name: u.clone(memory_format=torch.contiguous_format) for name, u in positions.items()
        }
        if not isinstance(beta, Tensor):
            beta = torch.tensor(beta, dtype=torch.float64)
        step = FunctionStep.of(self._function, pair)
        ready = self._find(step, (inputs, beta, pair.args, dict(pair.kwargs)), {})
        self._count(num_eager=ready is None)
        if ready is not None and not ready.graph.audit_times.is_due():
            outputs = self._try(ready.graph, ready)
        elif ready is not None and (found := self._try(ready.graph.rehearse, ready)) is not None:
            eager = slopes_at(programs, positions, beta)
            passes = self._passes(ready, _values(*eager).tensors, found)
            if not passes:
                return eager
            outputs = found.tensors
        else:
            outputs = None
        if outputs is None:
            return slopes_at(programs, positions, beta)
        densities, *slopes = outputs
        return Densities(*densities), dict(zip(positions, slopes, strict=False))
