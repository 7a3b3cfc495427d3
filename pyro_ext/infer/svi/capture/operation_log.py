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
from pyro.poutine.runtime import Message
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

    name: str | None = None

    def _pyro_sample(self, msg: Message) -> None:
        self.name = msg["name"]

    @property
    def place(self) -> str:
        """Words for where a program is."""
        return "before its first site" if self.name is None else f"at or after site '{self.name}'"

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Turns an error into a :class:`CaptureError` that says where the program was."""
        try:
            yield
        except Exception as error:
            raise CaptureError(f"{_reason_of(error)}, {self.place}") from error


def _reason_of(error: Exception) -> str:
    """What keeps a step from being captured, in a line."""
    if isinstance(error, CaptureError):
        return str(error)
    if "get value out of a tracing tensor" in str(error):
        return "the programs look at the value of a tensor, as in a branch, which a graph freezes"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class TensorsForNumbers(TorchFunctionMode):
    """Keeps values of tensors from becoming numbers of Python.

    ``item()`` gives a detached tensor: arithmetic with it goes on, and a branch on it is refused
    by the capture, as is an array of NumPy.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    #: Those that the run changed in place, and what they held.
    originals: dict[Tensor, Tensor] = field(default_factory=dict)
    #: Modules that were called.
    modules: list[nn.Module] = field(default_factory=list)
    #: Names of parameters that the programs came to.
    param_names: tuple[str, ...] = ()
    #: Generators that were drawn from, with their states before.
    generators: dict[torch.Generator, Tensor] = field(default_factory=dict)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undoes changes in place at the end."""
        try:
            yield
        finally:
            for generator, state in self.generators.items():
                generator.set_state(state)
            with torch.no_grad():
                for external, original in self.originals.items():
                    external.copy_(original)

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
        shorter, longer = sorted((self.operations, other.operations), key=len)
        if len(shorter) < len(longer):
            first = longer[len(shorter)]
            return f"one of two runs has more operations: {first.name} {first.place}"
        return None

    def difference_of_externals(self, other: "OperationLog") -> str | None:
        """Whether tensors from elsewhere are others in another run, and hold something else."""
        for mine, theirs in zip(self.externals, other.externals, strict=True):
            is_same = mine is theirs or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
            if not is_same:
                return f"a tensor of shape {tuple(mine.shape)} is made outside of torch in each run"
        return None


class _Logger(TorchDispatchMode):
    """Writes a log."""

    def __init__(self, log: OperationLog, site: CurrentSite) -> None:
        super().__init__()
        self.log = log
        self.site = site
        self.known = WeakTensorKeyDictionary()
        self.owner_of_storage: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = pytree.tree_leaves((args, kwargs))
        if func is torch.ops.aten.lift_fresh.default:
            with DisableTorchFunction():
                array = args[0].cpu().numpy()
            name, numbers = "torch.tensor", f" of {array.flatten()[:3]}"
            digest = hash(array.tobytes())
        else:
            name, numbers = str(func), repr([x for x in flat if not isinstance(x, Tensor)])
            digest = 0
            self._add_externals(flat)
            if schema_of(func).is_mutable or "batch_norm" in name:
                self._keep_originals(func, args, kwargs)
        for x in flat:
            if isinstance(x, torch.Generator):
                self.log.generators.setdefault(x, x.get_state())
        self.log.operations.append(Operation(self.site.place, name, numbers, digest))
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.known[x] = True
        return out

    def _add_externals(self, flat: list[Any]) -> None:
        for x in flat:
            if isinstance(x, Tensor) and x not in self.known:
                self.known[x] = True
                self.owner_of_storage.setdefault(storage_of(x), x)
                self.log.externals.append(x)

    def _keep_originals(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(schema_of(func).arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if schema_of(func).is_mutable and not is_written:
                continue  # batch_norm writes to its running statistics, but does not say so
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for x in pytree.tree_leaves(value):
                owner = self.owner_of_storage.get(storage_of(x)) if isinstance(x, Tensor) else None
                if owner is not None and owner not in self.log.originals:
                    self.log.originals[owner] = owner.detach().clone()


@contextmanager
def _logged(site: CurrentSite) -> Iterator[OperationLog]:
    """Logs all operations for a while. Changes in place are undone at the end."""
    log = OperationLog()
    with log.undone(), called_modules() as log.modules, _Logger(log, site):
        yield log


def log_operations(run: Callable[[], Outcome]) -> tuple[OperationLog, Outcome]:
    """Runs a step once, and undoes what it changes in place.

    :raises CaptureError: if the step draws from the generators of Python or NumPy, or has
        values leave the graph.
    """
    site = CurrentSite()
    before = _states_beside_torch()
    with site.named_in_errors(), site, _logged(site) as log, TensorsForNumbers():
        outcome = run()
    for module, state in _states_beside_torch().items():
        if state != before[module]:
            raise CaptureError(f"the programs draw random numbers from Python's module {module}")
    if log.generators:
        raise CaptureError("the programs draw from a torch.Generator of their own")
    log.param_names = tuple(outcome.params)
    return log, outcome


def _states_beside_torch() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    _, keys, *others = numpy_state
    return {"random": random.getstate(), "numpy.random": (keys.tolist(), others)}


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
    with (
        kept_random_states(0),
        poutine.trace(param_only=True) as trace,
        _logged(CurrentSite()) as log,
    ):
        run()
    return log.modules, list(trace.trace.nodes)
