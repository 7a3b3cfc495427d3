"""Logs one run of a step: its operations, and the tensors that it reads from outside."""

import random
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_ext._private.of_torch import (
    DisableTorchFunction,
    Recorder,
    pytree,
    schema_of,
    storage_of,
)
from pyro_ext._random_states import kept_random_states
from pyro_ext.distributed.noise import Draw, Redirected
from pyro_ext.infer.svi.capture.current_site import CurrentSite, reason_of
from pyro_ext.infer.svi.capture.recorder import CaptureError, GraphRecorder, Origin
from pyro_ext.infer.svi.capture.replacements import REPLACEMENTS
from pyro_ext.tracing.module_calls import called_modules

_MAX_LENGTH = 100  # of an operation in a message


@dataclass(frozen=True)
class Outcome:
    """The results of a step: the loss, and a gradient or None for each parameter by name."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    params: dict[str, Tensor]
    #: The tensors that the run has left where the programs never read them.
    kept: Sequence[Tensor] = ()

    @property
    def tensors(self) -> list[Tensor | None]:
        """The loss and gradients, in the order in which a graph returns them."""
        return [self.loss, *self.gradients.values()]


class TensorsForNumbers(TorchFunctionMode):
    """A mode in which the values of tensors do not become Python numbers.

    ``item()`` returns a detached tensor, so that arithmetic with it works. If the tensor is a
    constant, or an integer that depends on data only, ``item()`` returns the number.

    :param logger: the log of the run. It notes each tensor whose values or shape are used.
    :param recorder: the recorder of the graph.
    """

    def __init__(self, logger: "_Logger", recorder: GraphRecorder) -> None:
        super().__init__()
        self.logger = logger
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.logger.noted_errors(CaptureError):
            return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        x: Any = args[0] if args else None
        if isinstance(x, Tensor):
            x = detach_provenance(x)
            self.logger.touch(x)  # perhaps for its shape, without any operation
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise CaptureError(
                "the model or guide sets the data of a tensor. Change the tensor in place, for "
                "example with copy_"
            )
        if func is Tensor.item and self._stays_tensor(x):
            return x.detach().reshape(())
        if func in (Tensor.numpy, Tensor.__array__, Tensor.tolist):
            with DisableTorchFunction():
                is_allowed = self.recorder.read_all(x)
            if not is_allowed:
                raise CaptureError(
                    f"Tensor.{func.__name__} copies values out of the graph (use torch instead)"
                )
        return REPLACEMENTS.get(func, func)(*args, **kwargs)

    def _stays_tensor(self, x: Tensor) -> bool:
        """Return whether ``item()`` of a tensor returns a tensor."""
        with DisableTorchFunction():
            origin = self.recorder.origin_of(x)
            is_integer = not (x.is_floating_point() or x.is_complex())
            return origin != Origin.CONSTANT and not (origin == Origin.DATA and is_integer)


@dataclass(frozen=True)
class Operation:
    """One operation: its place, its name, and its arguments other than tensors.

    For a tensor that is made of numbers, these are its shape and a digest of its entries.
    """

    place: str
    name: str
    numbers: str
    digest: int = 0

    def __str__(self) -> str:
        text = self.name + self.numbers
        return text if len(text) <= _MAX_LENGTH else f"{text[: _MAX_LENGTH - 3]}..."


@dataclass
class OperationLog:
    """The operations of one run of a step."""

    operations: list[Operation] = field(default_factory=list)
    #: Tensors that the run used but did not make, in the order of their first use.
    externals: list[Tensor] = field(default_factory=list)
    #: Those of them that are arguments of operations.
    used: list[Tensor] = field(default_factory=list)
    #: External tensors that the run changed in place, with copies of their old values.
    originals: dict[Tensor, Tensor] = field(default_factory=dict)
    #: The dtypes of the results of all operations.
    dtypes: set[torch.dtype] = field(default_factory=set)
    #: Modules that the run called.
    modules: list[nn.Module] = field(default_factory=list)
    #: Names of the parameters that the programs used.
    param_names: tuple[str, ...] = ()
    #: Generators that the run used, with their states before it.
    generators: dict[torch.Generator, Tensor] = field(default_factory=dict)
    #: The first error of an operation, and its place.
    error: str | None = None

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Undo changes in place at the end."""
        try:
            yield
        finally:
            for generator, state in self.generators.items():
                generator.set_state(state)
            for external, original in self.originals.items():
                external.data.copy_(original)  # .data: a loss without its backward may hold it

    def without_tensors(self) -> "OperationLog":
        """Return the operations and names alone, which :meth:`difference` compares."""
        return OperationLog(self.operations, param_names=self.param_names)

    def difference(self, other: "OperationLog") -> str | None:
        """Return the first difference from the operations of another run, or None."""
        late = sorted(set(self.param_names) ^ set(other.param_names))
        if late:
            return f"parameter '{late[0]}' is used in only one of two runs of the same step"
        for mine, theirs in zip(self.operations, other.operations, strict=False):
            if mine != theirs:
                has_other_values = mine.digest != theirs.digest and str(mine) == str(theirs)
                found = (
                    f"{mine} is made from other numbers. Compute it from tensors"
                    if has_other_values
                    else f"{mine} in one, {theirs} in the other"
                )
                return f"two runs of the same step differ {theirs.place}: {found}"
        shorter, longer = sorted((self.operations, other.operations), key=len)
        if len(shorter) < len(longer):
            first = longer[len(shorter)]
            return f"one of two runs of the same step has more operations: {first} {first.place}"
        return None

    def difference_of_externals(
        self, other: "OperationLog", given: Container[Tensor] = ()
    ) -> str | None:
        """Return a difference between the external tensors of two runs, or None.

        :param other: the log of the other run.
        :param given: the tensors among its arguments.
        """
        for mine, theirs in zip(self.externals, other.externals, strict=True):
            is_same = (
                mine is theirs
                or theirs in given
                or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
            )
            if not is_same:
                return (
                    f"a tensor of shape {tuple(mine.shape)} is made outside of torch in each run, "
                    "with other values. Make it with torch, or once before training"
                )
        return None


class _Logger(Recorder):
    """A mode that writes all operations to a log."""

    def __init__(
        self, log: OperationLog, site: CurrentSite, recorder: GraphRecorder | None = None
    ) -> None:
        super().__init__()
        self.log = log
        self.site = site
        self.recorder = recorder
        self.known = WeakTensorKeyDictionary()
        self.touched = WeakTensorKeyDictionary()
        self.owner_of_storage: dict[int, Tensor] = {}
        #: The memory of tensors that the run has made, such as parameters of new modules.
        self.made: set[int] = set()
        self.is_paused = False

    @contextmanager
    def noted_errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Note the first error of some kinds, because the programs may handle it."""
        try:
            yield
        except kinds as error:
            self.log.error = self.log.error or f"{reason_of(error)}, {self.site.place}"
            raise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        with self.noted_errors(Exception):
            return self._run(func, args, kwargs or {})

    def log_draw(self, func: Any, args: Any, kwargs: Any, draw: Draw) -> Any:
        """Make a draw from a stream that is not torch's generator, and log it as one operation."""
        with self.noted_errors(Exception), DisableTorchFunction():
            self.is_paused = True
            try:
                out = draw(func, args, kwargs)
            finally:
                self.is_paused = False
            numbers = repr([x for x in args if not isinstance(x, Tensor)])
            self.log.operations.append(Operation(self.site.place, f"draw of {func}", numbers))
            self.known[out] = True
            if self.recorder is not None:
                self.recorder.record_draw(func, args, lambda *x: draw(func, x, kwargs), out)
            return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        flat = pytree.tree_leaves((args, kwargs))
        if func is torch.ops.aten.lift_fresh.default:
            with DisableTorchFunction():
                array = args[0].cpu().numpy()
            name, numbers = "torch.tensor", f" of shape {array.shape}"
            digest = hash((array.dtype, array.tobytes()))
        else:
            name, numbers = str(func), repr([x for x in flat if not isinstance(x, Tensor)])
            digest = 0
            for x in flat:
                if isinstance(x, Tensor):
                    if self.touched.pop(x, False) or x not in self.known:
                        self.log.used.append(x)
                    self.add_external(x)
        with DisableTorchFunction():
            written = self._written(func, args, kwargs)
            self._keep_originals(written)
        for x in flat:
            if isinstance(x, torch.Generator):
                self.log.generators.setdefault(x, x.get_state())
        self.log.operations.append(Operation(self.site.place, name, numbers, digest))
        out = func(*args, **kwargs)
        with DisableTorchFunction():
            for x in pytree.tree_leaves(out):
                if isinstance(x, Tensor):
                    self.known[x] = True
                    self.log.dtypes.add(x.dtype)
                    if storage_of(x) not in self.owner_of_storage:
                        self.made.add(storage_of(x))
            if self.recorder is not None:
                self.recorder.record(func, args, kwargs, out, written)
        return out

    def touch(self, x: Tensor) -> None:
        """Note that the run uses the values or the shape of a tensor, perhaps in no operation."""
        with DisableTorchFunction():
            if x not in self.known:
                self.touched[x] = True
                self.add_external(x)

    def add_external(self, x: Tensor) -> None:
        """Note that the run uses a tensor, if it has not made it."""
        if x not in self.known:
            self.known[x] = True
            self.owner_of_storage.setdefault(storage_of(x), x)
            self.log.externals.append(x)
            if self.recorder is not None:
                self.recorder.add_input(x)

    @staticmethod
    def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the arguments that an operation changes in place."""
        if not schema_of(func).is_mutable and "batch_norm" not in str(func):
            return []
        found = []
        for index, argument in enumerate(schema_of(func).arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            # The schema of batch_norm does not mark its running statistics as written.
            if is_written or argument.name in ("running_mean", "running_var"):
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                found += [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        return found

    def _keep_originals(self, written: Iterable[Tensor]) -> None:
        for x in written:
            owner = self.owner_of_storage.get(storage_of(x))
            is_made = storage_of(x) in self.made
            if owner is not None and not is_made and owner not in self.log.originals:
                self.log.originals[owner] = owner.detach().clone()


@contextmanager
def _logged(site: CurrentSite, recorder: GraphRecorder | None = None) -> Iterator[_Logger]:
    """Log all operations, and undo changes in place at the end."""
    log = OperationLog()
    with log.undone(), called_modules() as log.modules, _Logger(log, site, recorder) as logger:
        Redirected.listener = logger.log_draw
        try:
            yield logger
        finally:
            Redirected.listener = None


def log_operations(
    run: Callable[[], Outcome], given: Sequence[Tensor]
) -> tuple[OperationLog, Outcome, GraphRecorder]:
    """Run a step once, log its operations, and undo its changes in place.

    :param run: the step.
    :param given: the tensors among its arguments.
    :returns: the log and the results of the step, and the recorder of its graph.
    :raises CaptureError: if the step draws random numbers of Python or NumPy, or uses the values of
        tensors outside of torch.
    """
    site, recorder = CurrentSite(), GraphRecorder(given)
    before = _states_beside_torch()
    with (
        site.named_in_errors(),
        site,
        _logged(site, recorder) as logger,
        TensorsForNumbers(logger, recorder),
    ):
        outcome = run()
    log = logger.log
    if log.error is not None:  # a graph would not test whether the operation still fails
        raise CaptureError(f"{log.error}, and the model or guide handles this error")
    for module, state in _states_beside_torch().items():
        if state != before[module]:
            raise CaptureError(
                f"the model or guide draws random numbers from the module {module}. Draw them "
                "with torch or Pyro"
            )
    if log.generators:
        raise CaptureError(
            "the model or guide draws from a torch.Generator. Use torch's default generator"
        )
    log.param_names = tuple(outcome.params)
    return log, outcome, recorder


def _states_beside_torch() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    _, keys, *others = numpy_state
    return {"random": random.getstate(), "numpy.random": (keys.tolist(), others)}


def set_up(run: Callable[[], Any], seed: int | None = 0) -> tuple[list[nn.Module], list[str]]:
    """Run programs once so that they initialise themselves, and undo changes in place.

    :param run: the run.
    :param seed: the seed of its random numbers; None for those that come next.
    :returns: the modules that the run calls, and the names of the parameters that it uses.
    """
    with (
        kept_random_states(seed),
        poutine.trace(param_only=True) as trace,
        _logged(CurrentSite()) as logger,
    ):
        run()
    return logger.log.modules, list(trace.trace.nodes)
