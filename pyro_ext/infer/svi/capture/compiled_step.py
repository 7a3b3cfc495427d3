"""One captured step: how it is made, checked and run."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_ext._private.of_torch import pytree
from pyro_ext._random_states import kept_random_states
from pyro_ext.infer.svi.capture.backends import Backend, CompileError, compile_graph
from pyro_ext.infer.svi.capture.graph import capture, compute
from pyro_ext.infer.svi.capture.graph_inputs import (
    TensorSource,
    current_params,
    find_source,
    layout,
)
from pyro_ext.infer.svi.capture.lifted_floats import LiftedFloats
from pyro_ext.infer.svi.capture.operation_log import CaptureError, OperationLog, Outcome, observe
from pyro_ext.infer.svi.capture.reachable_search import look_around
from pyro_ext.infer.svi.capture.reachable_state import ReachableState

_SEED = 20_090_911
_SCHEDULE = "loss.schedule"  # whose factor reaches the graph as a tensor


@dataclass(frozen=True)
class Step:
    """A step as Pyro runs it, with its arguments.

    :param objective: the ELBO, or a function that returns a differentiable loss.
    :param model: the model.
    :param guide: the guide.
    :param loss: the function that evaluates the loss.
    :param loss_and_grads: the function that evaluates it and adds gradients to ``.grad``.
    :param bool has_gradients: whether gradients are wanted.
    :param handlers: the effect handlers around the step.
    """

    objective: Any
    model: Callable[..., Any]
    guide: Callable[..., Any]
    loss: Callable[..., Any]
    loss_and_grads: Callable[..., Any]
    has_gradients: bool
    handlers: tuple[Any, ...] = ()

    def compute(self, leaves: Sequence[Any], spec: Any) -> Outcome:
        """Loss and gradients for the leaves of the arguments, and their structure."""
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        loss = getattr(self.objective, "differentiable_loss", None)
        if loss is None:
            if hasattr(self.objective, "loss_and_grads"):
                name = type(self.objective).__name__
                raise CaptureError(f"{name} has no differentiable_loss")
            loss = self.objective
        return compute(lambda: loss(self.model, self.guide, *args, **kwargs), self.has_gradients)

    def run_as_svi(
        self, leaves: Sequence[Any], spec: Any, names: Sequence[str]
    ) -> list[Tensor | None]:
        """What ``SVI`` would compute: the loss, and gradients of the parameters of some names."""
        args, kwargs = pytree.tree_unflatten(list(leaves), spec)
        run = self.loss_and_grads if self.has_gradients else self.loss
        params = current_params()
        before = {name: param.grad for name, param in params.items()}
        for param in params.values():
            param.grad = None
        try:
            with torch.set_grad_enabled(self.has_gradients), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = run(self.model, self.guide, *args, **kwargs)
            dtype = None if isinstance(loss, Tensor) else torch.float64
            return [torch.as_tensor(loss, dtype=dtype), *(params[name].grad for name in names)]
        finally:
            for name, param in params.items():
                param.grad = before[name]

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
    run: Callable[..., Sequence[Tensor | None]]
    sources: list[TensorSource]
    layouts: list[tuple[Any, ...]]
    names: list[str]
    tied: list[tuple[str, str]]
    surroundings: ReachableState
    numbers: LiftedFloats
    observation: OperationLog
    num_runs: int = 0

    def __call__(self, arguments: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Loss and gradients, the latter in the order of ``names``."""
        self.num_runs += 1
        self.numbers.update()
        with torch.no_grad():
            return self.run(*arguments, *inputs)

    def inputs(self, params: dict[str, Tensor]) -> list[Tensor] | None:
        """The tensors of now that the graph reads beside arguments; None if they do not fit."""
        is_tied = all(params.get(name) is params.get(other) for name, other in self.tied)
        if not (is_tied and self.numbers.matches):
            return None
        found: list[Tensor] = []
        for source, expected in zip(self.sources, self.layouts, strict=True):
            tensor = source.get(params)
            if tensor is None or layout(tensor) != expected:
                return None
            found.append(tensor)
        return found

    def audit(self, leaves: Sequence[Any], spec: Any) -> str | None:
        """What the programs do differently from what was captured; None if nothing."""
        aliases = _aliases(self.numbers.lift(leaves))
        try:
            with kept_random_states(_SEED), self.numbers:
                now, _ = observe(lambda: self.step.compute(aliases, spec))
        except CaptureError as error:
            return str(error)
        return self.observation.difference(now)


class NeedsEagerStepError(Exception):
    """A step makes parameters, whose first values a capture must not draw."""


class _Findings(NamedTuple):
    observation: OperationLog
    surroundings: ReachableState
    externals: list[Tensor]
    outcome: Outcome


def build_step(
    step: Step, leaves: Sequence[Any], spec: Any, numbers: LiftedFloats, backend: Backend
) -> CompiledStep:
    """Captures, checks and compiles a step; random and other states stay as they were.

    :param Step step: the step.
    :param leaves: of its arguments.
    :param spec: their structure.
    :param LiftedFloats numbers: those of the objective that become inputs; numbers among the
        arguments become inputs too if there may be any.
    :param Backend backend: what compiles.
    :raises CaptureError: if a graph would not do what the programs do.
    :raises NeedsEagerStepError: if the programs make parameters.
    :raises CompileError: if the compiler fails.
    :raises RuntimeError: if the compiled graph computes something else.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if any(leaf.requires_grad for leaf in tensors):
        raise CaptureError("an argument requires gradients")
    if any(leaf.layout != torch.strided for leaf in tensors):
        raise CaptureError("an argument is a sparse tensor")
    aliases = _aliases(numbers.lift(leaves))
    arguments = [leaf for leaf in aliases if isinstance(leaf, Tensor)]

    def run() -> Outcome:
        return step.compute(aliases, spec)

    before = look_around(step.roots, [*numbers.labels, _SCHEDULE])
    try:
        with numbers:
            observation, around, externals, outcome = _observe_twice(
                step, run, leaves, aliases, numbers
            )
            names = list(outcome.gradients)
            externals = [x for x in externals if not any(x is argument for argument in arguments)]
            inputs = [*arguments, *externals]
            with kept_random_states(_SEED + 2):
                try:
                    graph = capture(run, inputs)
                finally:
                    observation.restore()
        expected = _outputs(lambda: step.run_as_svi(leaves, spec, names), observation)
        found = _outputs(lambda: graph(*inputs), observation)
        difference = _difference(expected, found, names)
        if difference is not None:
            raise CaptureError(f"the graph does not compute what the programs do: {difference}")
        compiled = compile_graph(graph, inputs, backend)
        try:
            found = _outputs(lambda: compiled(*inputs), observation)
        except Exception as error:
            raise CompileError(f"what {backend.name} compiled fails: {error}") from error
        difference = _difference(expected, found, names)
        if difference is not None:
            raise RuntimeError(
                f"CompiledSVI: the step compiled by {backend.name} does not compute what the "
                f"eager one does: {difference}. Expected the same up to rounding; use "
                "backend='eager'."
            )
    finally:
        before.restore()
    params = current_params()
    return CompiledStep(
        step=step,
        run=compiled,
        sources=[find_source(tensor, params, around) for tensor in externals],
        layouts=[layout(tensor) for tensor in externals],
        names=names,
        tied=[
            (name, other)
            for name, param in outcome.params.items()
            for other in names
            if name != other and param is outcome.params[other]
        ],
        surroundings=around,
        numbers=numbers,
        observation=observation,
    )


def _observe_twice(
    step: Step,
    run: Callable[[], Outcome],
    leaves: Sequence[Any],
    aliases: Sequence[Any],
    numbers: LiftedFloats,
) -> _Findings:
    """Observes runs with different random numbers of all kinds, which are to do the same."""
    known = set(current_params())
    with kept_random_states(_SEED):
        # What happens in a first run only, such as finding out the plates, happens here.
        warm_up, _ = observe(run)
    born = current_params().keys() - known
    if born:
        for name in born:
            del pyro.get_param_store()[name]
        raise NeedsEagerStepError
    opaque = [("argument", leaf) for leaf in aliases if not isinstance(leaf, Tensor)]
    modules = [(type(module).__name__, module) for module in warm_up.modules]
    around = look_around([*step.roots, *opaque, *modules], [*numbers.labels, _SCHEDULE])
    with kept_random_states(_SEED):
        first, _ = observe(run)
    lifted = [
        x
        for x, leaf in zip(aliases, leaves, strict=True)
        if isinstance(x, Tensor) and type(leaf) is float
    ]
    with kept_random_states(_SEED + 1), numbers.nudged(lifted):
        second, outcome = observe(run)
    changed = around.changed_by_programs()
    reason = (
        f"the programs change '{changed}' themselves"
        if changed is not None
        else first.difference(second) or first.difference_of_externals(second)
    )
    if reason is not None:
        raise CaptureError(reason)
    externals = zip(first.externals, second.externals, strict=True)
    lasting = [tensor for before, tensor in externals if tensor is before]  # others are constants
    return _Findings(second, around, lasting, outcome)


def _aliases(leaves: Iterable[Any]) -> list[Any]:
    # The same tensor may be an argument and known to the programs by another way.
    return [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _outputs(run: Callable[[], Sequence[Any]], observation: OperationLog) -> list[Any]:
    """Outputs for noise other than that of the capture, and the state of the generator after."""
    try:
        with kept_random_states(_SEED + 3), torch.no_grad():
            outputs = [x if x is None else x.detach().clone() for x in run()]
            return [*outputs, torch.get_rng_state()]
    finally:
        observation.restore()


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
