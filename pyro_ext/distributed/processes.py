"""The processes of a ``torch.distributed`` group, and what they tell each other."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from pyro_ext._private.of_torch import default_store, is_nccl

T = TypeVar("T")

_POLL = timedelta(seconds=2)
#: The time in which the other processes notice that one of them has noticed a failure.
_GRACE = timedelta(seconds=6)
_KEY = "pyro_ext/rank {} has noticed a failure"
_IS_SEPARATE = ContextVar("is_separate", default=False)


@dataclass(frozen=True)
class Processes:
    """The processes of the default group of ``torch.distributed``.

    Every process must call the same methods in the same order. If a process has ended or does not
    answer within the timeout of the group, the others raise an error with its rank.

    :ivar rank: the rank of this process.
    :ivar size: the number of processes P > 1.
    """

    rank: int
    size: int

    def add(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the device of the tensor.

        :param x: the tensor, which may be overwritten.
        """
        sent = self._on_device(x)
        self._wait(lambda: distributed.all_reduce(sent, async_op=True))
        return sent.to(x.device)

    def start_to_add(self, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        """Start to add a tensor over all processes.

        :param x: the tensor, which may be overwritten.
        :returns: the tensor that holds the sum after a wait, and the function that waits.
        """
        sent = self._on_device(x)
        with self._named_failures():
            work = distributed.all_reduce(sent, async_op=True)
        return sent, lambda: self._wait(lambda: work)

    def copy_from_first(self, x: Tensor) -> None:
        """Replace the values of a tensor by those of rank 0."""
        sent = self._on_device(x.detach().contiguous())
        content = sent.reshape(-1).view(torch.uint8)  # not all backends know all dtypes
        self._wait(lambda: distributed.broadcast(content, 0, async_op=True))
        with torch.no_grad():
            x.copy_(sent)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank.

        :param value: the value of this process, which must be picklable. Tensors come back on
            their device, if this process has it.
        """
        mine = _packed(value)
        sizes = self._gather_equal(torch.tensor([len(mine)])).flatten().tolist()
        padded = mine.new_zeros(max(sizes))
        padded[: len(mine)] = mine
        rows = self._gather_equal(padded)
        return [_loaded(row[:size]) for row, size in zip(rows, sizes, strict=True)]

    def result_of_first(self, compute: Callable[[], T], owner: str) -> T:
        """Return the result of a computation that only rank 0 makes.

        :param compute: the computation. Its result must be picklable.
        :param owner: the name of the caller, for messages.
        :raises RuntimeError: if the computation fails. On rank 0, its own error is raised.
        """
        error, content = None, torch.empty(0, dtype=torch.uint8)
        if self.rank == 0:
            try:
                content = _packed(compute())
            except BaseException as caught:
                error, content = caught, _packed(describe_error(caught))
        header = torch.tensor([error is not None, len(content)])
        self.copy_from_first(header)
        has_failed, length = header.tolist()
        content = content if self.rank == 0 else content.new_empty(length)
        self.copy_from_first(content)
        if error is not None:
            raise error
        found: Any = _loaded(content)
        self.raise_for([found if has_failed else None], owner)
        return found

    def results_of_all(self, compute: Callable[[], T], owner: str) -> list[T]:
        """Return the results of a computation in all processes, by rank.

        :param compute: the computation. If it uses this group, it must do so in the same way in
            each process, even if it fails.
        :param owner: the name of the caller, for messages.
        :raises RuntimeError: if the computation fails in another process. Where it fails, its own
            error is raised.
        """
        result, error = None, None
        try:
            result = compute()
        except BaseException as caught:
            error = caught
        found = self.gather((result, describe_error(error)))
        if error is not None:
            raise error
        self.raise_for([text for _, text in found], owner)
        return [value for value, _ in found]  # type: ignore[misc]

    def raise_for(self, errors: list[str | None], owner: str) -> None:
        """Raise a RuntimeError if there are errors of other processes.

        :param errors: the description of the error of each process, or None.
        :param owner: the name of the caller.
        """
        for rank, text in enumerate(errors):
            if text is not None:
                raise RuntimeError(f"{owner}: rank {rank} of {self.size} failed with {text}")

    def _gather_equal(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes, which have equal shapes, stacked on the CPU."""
        sent = self._on_device(x)
        found = [torch.empty_like(sent) for _ in range(self.size)]
        self._wait(lambda: distributed.all_gather(found, sent, async_op=True))
        return torch.stack(found).cpu()

    def _on_device(self, x: Tensor) -> Tensor:
        return x.cuda() if is_nccl() and not x.is_cuda else x

    def _wait(self, start: Callable[[], Any]) -> None:
        """Wait for the end of a collective operation."""
        with self._named_failures():
            work = start()
            if is_nccl():  # its watchdog ends the process after the timeout
                work.wait()
                return
            while not work.is_completed():
                try:
                    work.wait(_POLL)
                except RuntimeError:
                    if work.is_completed():
                        raise
                    if any(map(self._has_noticed, range(self.size))):
                        raise
            work.wait()

    def _has_noticed(self, rank: int) -> bool:
        return bool(default_store().check([_KEY.format(rank)]))

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        """Turn the error of a collective operation into one that names the lost processes."""
        try:
            yield
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            raise RuntimeError(
                f"pyro_ext: {self._lost()} (rank {self.rank} of {self.size} noticed it: {line})"
            ) from error

    def _lost(self) -> str:
        """Return which processes do not answer, in words."""
        try:
            store = default_store()
            store.set(_KEY.format(self.rank), "yes")
            lost = []
            for rank in range(self.size):
                try:
                    store.wait([_KEY.format(rank)], _GRACE)
                except RuntimeError:
                    lost.append(rank)
        except RuntimeError:
            return "the process that holds the store does not answer; often it is rank 0"
        if not lost:
            return "the processes could not exchange tensors, although all of them answer"
        ranks = ", ".join(map(str, lost))
        subject = f"rank {ranks} has" if len(lost) == 1 else f"ranks {ranks} have"
        return f"{subject} ended, or did not answer within the timeout of the process group"


def current_processes() -> Processes | None:
    """Return the processes of the default group; None without a group, or if it has one process.

    It is None inside of :func:`separate_processes`, too.
    """
    if _IS_SEPARATE.get():
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    size = distributed.get_world_size()
    return None if size == 1 else Processes(distributed.get_rank(), size)


@contextmanager
def separate_processes() -> Iterator[None]:
    """Let each process compute by itself in a block, because its work is a part of a division."""
    token = _IS_SEPARATE.set(True)
    try:
        yield
    finally:
        _IS_SEPARATE.reset(token)


def describe_error(error: BaseException | None) -> str | None:
    """Return the type and the first line of an error, for other processes."""
    if error is None:
        return None
    line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _packed(value: Any) -> Tensor:
    """Return a value as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _loaded(content: Tensor) -> Any:
    """Return the value that :func:`_packed` made into bytes."""
    # Every process runs the same program, so its pickles are those of this program.
    file = io.BytesIO(content.numpy().tobytes())
    return torch.load(file, map_location=_own_device, weights_only=False)


def _own_device(storage: Any, location: str) -> Any:
    """Load a tensor on the device of its kind that this process uses."""
    return storage.cuda() if location.startswith("cuda") else storage
