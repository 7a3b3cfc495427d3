"""Log weights of chunks of draws from compiled graphs."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyro_ext._random_states import kept_random_states
from pyro_ext.infer.evidence.data_blocks import DataBlock
from pyro_ext.infer.evidence.proposals import PriorProposal
from pyro_ext.infer.svi.capture.compiled_step import CompiledStep
from pyro_ext.infer.svi.capture.front import Front, Settings
from pyro_ext.infer.svi.capture.function_step import FunctionStep, Values
from pyro_ext.infer.svi.capture.graphs import ReadyGraph
from pyro_ext.tracing import Particles, ParticleTracer, Program, Programs
from pyro_ext.tracing.shared_values import SharedSubsamples

#: The graphs of the last programs, for later calls.
_KEPT: deque["CompiledWeights"] = deque(maxlen=4)


@contextmanager
def compiled_weights(
    owner: str, compile: bool | str, programs: Programs, max_plate_nesting: float, scale: float
) -> Iterator["CompiledWeights | None"]:
    """Provide the graphs of model and guide in a call, perhaps with those of an earlier call.

    :param owner: the name of the estimate, for messages.
    :param compile: the argument of the estimate. If it is False, there are no graphs.
    :param programs: the model and the guide without its wider scales.
    :param max_plate_nesting: the number of nested plates.
    :param scale: the factor of the scales of the guide.
    :raises ValueError: if ``compile`` is out of range.
    """
    settings = Settings.of_compile(owner, compile, compile_after=1)
    if settings is None:
        yield None
        return
    # A prior is made anew for each call, and its model tells it from others.
    is_prior = isinstance(programs.guide, PriorProposal)
    pair = Programs(programs.model, programs.model if is_prior else programs.guide)
    key = owner, settings, max_plate_nesting, scale, is_prior
    equal = (x for x in _KEPT if x.key == key and pair.is_same_pair(x.pair))
    graphs = next(equal, None) or CompiledWeights(owner, settings, pair, key)
    if graphs in _KEPT:
        _KEPT.remove(graphs)
    _KEPT.append(graphs)
    graphs.start()
    try:
        yield graphs
    finally:
        graphs.end()


class CompiledWeights(Front):
    """The log weights of chunks as compiled graphs, under the contract of CompiledSVI.

    The arguments of the programs and the rows of minibatches are inputs of a graph. In each call,
    the programs run for the first chunk, with all checks, and the first use of a graph is an audit.
    Where there is no graph, they run for each chunk.

    :param owner: the name of the estimate, for messages.
    :param settings: the settings of the graphs.
    :param pair: the model and guide, to be found by a later call.
    :param key: the other values that a later call must have.
    """

    def __init__(self, owner: str, settings: Settings, pair: Programs, key: Any) -> None:
        self._front = owner
        self._set_up(settings)
        self.pair = pair
        self.key = key
        self._programs: Programs | None = None
        self._function = _LogDensities(ParticleTracer())
        self._draws_rows = False
        #: The particles of each graph without traces.
        self._known: WeakKeyDictionary[CompiledStep, Particles] = WeakKeyDictionary()
        self._is_checked = False
        self._block: DataBlock | None = None

    def start(self) -> None:
        """Start a call, which warns anew."""
        self._warned.clear()
        self._is_checked = False

    def end(self) -> None:
        """End a call, without keeping its data."""
        self._block = None
        self._graphs.forget_arguments()

    def draw(
        self,
        block: DataBlock,
        num_particles: int,
        tracer: ParticleTracer,
        draw_eagerly: Callable[[], Particles],
    ) -> tuple[Particles, bool]:
        """Return a chunk of draws, and whether a graph has made it.

        :param block: the block of data, with model and guide.
        :param num_particles: the number of draws.
        :param tracer: the tracer that runs the programs.
        :param draw_eagerly: a function that runs them, with all checks.
        """
        if self._programs is None:
            self._programs = block.programs.without_arguments
            self._function = _LogDensities(tracer)
        ready = self._ready(block, num_particles, tracer)
        self._block = block
        self._count(num_eager=ready is None)
        if ready is None:
            particles = draw_eagerly()
            self._draws_rows = bool(block.subsamples.drawn)
            return particles, False
        is_known = self._is_checked and ready.graph in self._known
        if ready.graph.audit_times.is_due() or not is_known:
            return self._audited(ready, draw_eagerly), False
        outputs = self._try(ready.graph, ready)
        if outputs is None:
            return draw_eagerly(), False
        return _with_densities(self._known[ready.graph], outputs[0]), True

    def _ready(
        self, block: DataBlock, num_particles: int, tracer: ParticleTracer
    ) -> ReadyGraph | None:
        """Return the graph for a chunk, or None to run the programs."""
        is_new = self._block is not block
        if self._block is None:
            # In a first chunk, the programs show whether they can take several particles at once.
            sizes = [len(particles.log_p) for particles in self._known.values()]
            if num_particles == 1 or num_particles not in sizes:
                return None
            # A run begins with this, and draws numbers again if it has to enumerate.
            is_undone = self._function.tracer.memory.enumerates
            with kept_random_states() if is_undone else nullcontext():
                tracer.plate_nesting(block.programs, block.subsamples)
        assert self._programs is not None  # since the first chunk
        rows = block.subsamples.chosen
        if rows is None or (self._draws_rows and not block.subsamples.drawn):
            return None  # the programs choose the minibatch of the block
        inputs = rows, num_particles, block.programs.args, dict(block.programs.kwargs)
        ready = self._find(FunctionStep.of(self._function, self._programs), inputs, {})
        known = ready and self._known.get(ready.graph)
        has_outer = known is not None and len(known.outer_terms) > 0
        return None if is_new and has_outer else ready

    def _audited(self, ready: ReadyGraph, draw_eagerly: Callable[[], Particles]) -> Particles:
        """Run the programs, and compare them with the graph on the same noise and state."""
        found = self._try(ready.graph.rehearse, ready)
        particles = draw_eagerly()
        if found is None or not self._passes(ready, [_densities(particles)], found):
            return particles
        self._is_checked = True
        self._known[ready.graph] = replace(
            particles, model_traces=(), guide_traces=(), density_sites=[], score=None
        )
        return _with_densities(particles, found.tensors[0])


class _LogDensities:
    """The log densities of a chunk as a function of the inputs of a graph."""

    def __init__(self, tracer: ParticleTracer) -> None:
        self.tracer = tracer

    def __call__(
        self,
        model: Program,
        guide: Program,
        rows: Mapping[str, Any],
        num_particles: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Values:
        programs = Programs(model, guide, tuple(args), kwargs)
        particles = self.tracer.trace(programs, num_particles, SharedSubsamples(rows))
        return Values(_densities(particles), {})


def _densities(particles: Particles) -> Tensor:
    return torch.stack([particles.log_p, particles.log_q])


def _with_densities(particles: Particles, densities: Any) -> Particles:
    log_p, log_q = densities
    return replace(particles, log_p=log_p, log_q=log_q, log_q_rest=log_q)
