"""What one run of a step does: its operations, and the tensors that it did not make itself."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_ext._private.of_torch import (
    DisableTorchFunction,
    TorchDispatchMode,
    pytree,
    schema_of,
    storage_of,
)
from pyro_ext._random_states import kept_random_states


class CaptureError(Exception):
    """A step does something that a graph would freeze; the message says what, and where."""


@dataclass(frozen=True)
class Outcome:
    """What a step computes: the loss, and a gradient or None for each parameter by name."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    params: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor | None]:
        """Loss and gradients, as a graph returns them."""
        return [self.loss, *self.gradients.values()]


class CurrentSite(Messenger):
    """Knows the last sample site that a program came to."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]

    @property
    def place(self) -> str:
        """Words for where a program is."""
        return "before its first site" if self.name is None else f"at or after site '{self.name}'"


class TensorsForNumbers(TorchFunctionMode):
    """Keeps values of tensors from becoming numbers of Python.

    ``item()`` gives a detached tensor: arithmetic with it goes on, and a branch on it is refused
    by the capture, as is an array of NumPy.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.item:
            return args[0].detach().reshape(())
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist):
            raise CaptureError(f"Tensor.{func.__name__} takes values out of the graph")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Operation:
    """One operation: where, which, and with what arguments beside tensors.

    For a tensor that is made of numbers those are the first ones, and a digest of all.
    """

    place: str
    name: str
    numbers: str
    digest: int = 0


@dataclass
class OperationLog:
    """What one run of a step did."""

    operations: list[Operation] = field(default_factory=list)
    #: Tensors that were used but not made, in the order of their first use.
    externals: list[Tensor] = field(default_factory=list)
    #: What those held that the run changed in place.
    originals: dict[int, Tensor] = field(default_factory=dict)
    #: Modules that were called.
    modules: list[nn.Module] = field(default_factory=list)
    #: Names of parameters that the programs came to.
    param_names: tuple[str, ...] = ()
    #: Generators that were drawn from, with their states before.
    generators: dict[torch.Generator, Tensor] = field(default_factory=dict)

    def restore(self) -> None:
        """Undoes changes in place."""
        for generator, state in self.generators.items():
            generator.set_state(state)
        with torch.no_grad():
            for index, original in self.originals.items():
                self.externals[index].copy_(original)

    def difference(self, other: "OperationLog") -> str | None:
        """Where another run did other operations; None if it did the same."""
        late = sorted(set(self.param_names) ^ set(other.param_names))
        if late:
            return f"parameter '{late[0]}' is there in one of two runs only"
        for mine, theirs in zip(self.operations, other.operations, strict=False):
            if mine != theirs:
                return (
                    f"two runs do not do the same {theirs.place}: {mine.name}{mine.numbers} in "
                    f"one, {theirs.name}{theirs.numbers} in the other"
                )
        if len(self.operations) != len(other.operations):
            longer = max(self.operations, other.operations, key=len)
            first = longer[min(len(self.operations), len(other.operations))]
            return f"one of two runs has more operations: {first.name} {first.place}"
        return None

    def difference_of_externals(self, other: "OperationLog") -> str | None:
        """Whether tensors from elsewhere are others in another run, and hold something else."""
        for mine, theirs in zip(self.externals, other.externals, strict=True):
            if mine is not theirs and not _is_equal(mine, theirs):
                return f"a tensor of shape {tuple(mine.shape)} is made outside of torch in each run"
        return None


class _Observer(TorchDispatchMode):
    """Writes an observation."""

    def __init__(self, observation: OperationLog, site: CurrentSite) -> None:
        super().__init__()
        self.observation = observation
        self.site = site
        self.made = WeakTensorKeyDictionary()
        self.owner_of_storage: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        flat = pytree.tree_leaves((args, kwargs))
        operation = Operation(
            self.site.place, str(func), repr([x for x in flat if not isinstance(x, Tensor)])
        )
        if func is torch.ops.aten.lift_fresh.default:
            with DisableTorchFunction():
                array = args[0].cpu().numpy()
            first = f" of {array.flatten()[:3]}"
            operation = Operation(self.site.place, "torch.tensor", first, hash(array.tobytes()))
        else:
            for x in flat:
                if isinstance(x, Tensor) and x not in self.made:
                    self._add_external(x)
            if schema_of(func).is_mutable or "batch_norm" in str(func):
                self._keep_originals(func, args, kwargs)
        for x in flat:
            if isinstance(x, torch.Generator):
                self.observation.generators.setdefault(x, x.get_state())
        self.observation.operations.append(operation)
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.made[x] = True
        return out

    def _add_external(self, x: Tensor) -> None:
        externals = self.observation.externals
        if not any(x is other for other in externals):
            self.owner_of_storage.setdefault(storage_of(x), len(externals))
            externals.append(x)

    def _keep_originals(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(schema_of(func).arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if schema_of(func).is_mutable and not is_written:
                continue  # batch_norm writes to its running statistics, but does not say so
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for x in pytree.tree_leaves(value):
                if isinstance(x, Tensor):
                    self._keep_original(self.owner_of_storage.get(storage_of(x)))

    def _keep_original(self, index: int | None) -> None:
        if index is not None and index not in self.observation.originals:
            external = self.observation.externals[index]
            self.observation.originals[index] = external.detach().clone()


def observe(run: Callable[[], Outcome]) -> tuple[OperationLog, Outcome]:
    """Runs a step once, and undoes what it changes in place.

    :raises CaptureError: if the step draws from the generators of Python or NumPy, or has
        values leave the graph.
    """
    observation = OperationLog()
    site = CurrentSite()
    before = random.getstate(), np.random.get_state()
    try:
        with (
            site,
            TensorsForNumbers(),
            called_modules() as observation.modules,
            _Observer(observation, site),
        ):
            outcome = run()
    except Exception as error:
        raise CaptureError(f"{reason_of(error)}, {site.place}") from error
    finally:
        observation.restore()
    for module, old, new in (
        ("random", before[0], random.getstate()),
        ("numpy.random", before[1], np.random.get_state()),
    ):
        if not _same_state(old, new):
            raise CaptureError(f"the programs draw random numbers from Python's module {module}")
    if observation.generators:
        raise CaptureError("the programs draw from a torch.Generator of their own")
    observation.param_names = tuple(outcome.params)
    return observation, outcome


@contextmanager
def called_modules() -> Iterator[list[nn.Module]]:
    """A list of the modules that are called, in the order of their first calls."""
    modules: list[nn.Module] = []
    seen: set[int] = set()

    def remember(module: nn.Module, inputs: Any) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            modules.append(module)

    hook = register_module_forward_pre_hook(remember)
    try:
        yield modules
    finally:
        hook.remove()


def set_up(run: Callable[[], Any]) -> tuple[list[nn.Module], list[str]]:
    """Runs programs for what happens in a first run only, and undoes what it changes in place.

    :returns: the modules that they call, and the names of the parameters that they use.
    """
    observation = OperationLog()
    try:
        with (
            kept_random_states(0),
            poutine.trace(param_only=True) as trace,
            called_modules() as modules,
            _Observer(observation, CurrentSite()),
        ):
            run()
    finally:
        observation.restore()
    return modules, list(trace.trace.nodes)


def reason_of(error: Exception) -> str:
    """What keeps a step from being captured, in a line."""
    if isinstance(error, CaptureError):
        return str(error)
    if "get value out of a tracing tensor" in str(error):
        return "the programs look at the value of a tensor, as in a branch, which a graph freezes"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _same_state(old: Any, new: Any) -> bool:
    if isinstance(old, tuple):
        return all(_same_state(a, b) for a, b in zip(old, new, strict=True))
    return np.array_equal(old, new)


def _is_equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype and bool(torch.equal(x, y))
