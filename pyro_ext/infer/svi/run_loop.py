"""The loop of a training run: epochs, steps, the progress bar, checkpoints and interrupts."""

import itertools
import math
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, describe
from pyro_ext._files import StrPath, check_writable
from pyro_ext._interruption import Interrupts, NestedInterrupt, postponed_interrupts
from pyro_ext._random_states import random_states, set_random_states
from pyro_ext.distributed.loaders import set_epoch
from pyro_ext.infer.svi.history import TrainingHistory
from pyro_ext.infer.svi.minibatches import Data, arguments_of, length_of, minibatches
from pyro_ext.infer.svi.saved_run import check_state, save_run
from pyro_ext.infer.svi.unread_losses import read_together

Callback = Callable[[TrainingHistory], Any]

_WINDOW = 50  # steps that the loss of the progress bar averages


def check_run(
    owner: str,
    data: Data,
    num_epochs: int,
    checkpoint: Any,
    checkpoint_every: int | None,
    is_written: bool = True,
) -> None:
    """Raise an error if an argument of ``run`` is wrong.

    :param owner: the name of the method, for messages.
    :param is_written: whether this process writes the checkpoint.
    """
    if isinstance(data, int):
        check_integer(owner, "data (a number of steps)", data, 1)
    elif isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"{owner}: data must be a number of steps or an iterable of minibatches, but it "
            f"is {describe(data)}. If each step uses all data, pass the number of steps, and "
            "the data as args=(x,)."
        )
    check_integer(owner, "num_epochs", num_epochs, 1)
    if checkpoint is not None and is_written:
        if not Path(checkpoint).absolute().parent.is_dir():
            raise ValueError(
                f"{owner}: the folder of checkpoint='{checkpoint}' does not exist. Create it first."
            )
        check_writable(checkpoint)
    if checkpoint_every is not None:
        check_integer(owner, "checkpoint_every", checkpoint_every, 1)
        if checkpoint is None:
            raise ValueError(
                f"{owner}: checkpoint_every needs a checkpoint. Pass the path of a file as "
                "checkpoint=."
            )


@dataclass
class RunLoop:
    """The loop of a training run.

    :ivar svi: the SVI. The other attributes are arguments of its method ``run``.
    """

    svi: Any
    data: Data
    num_epochs: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    callback: Callback | None
    checkpoint: StrPath | None
    checkpoint_every: int | None

    @property
    def group(self) -> Any:
        """The processes that train together; None for one process."""
        return self.svi._group

    def run(self, progress_bar: bool) -> None:
        """Take the steps that are left."""
        history, group = self.svi.history, self.group
        length = length_of(self.data)
        bar = self.svi._bar = tqdm(
            total=None if length is None else self.num_epochs * length,
            initial=len(history.losses),
            disable=not progress_bar or (group is not None and group.processes.rank > 0),
            unit="step",
        )
        with postponed_interrupts(signal.SIGINT, signal.SIGTERM) as interrupts, bar:
            if group is not None:
                group.has_signal = lambda: bool(interrupts)
            try:
                for _ in self._steps(bar):
                    is_due = self.checkpoint_every is not None and (
                        len(history.losses) % self.checkpoint_every == 0
                    )
                    if is_due:
                        self._read_losses()
                    wants_stop = self._wants_stop(history)
                    is_due = is_due or history.is_epoch_end or wants_stop
                    is_interrupted = bool(interrupts) if group is None else group.is_interrupted
                    if is_interrupted:
                        self._read_losses()
                    if group is not None and (is_due or is_interrupted):
                        group.copy_state(self.svi._called)
                    if self.checkpoint is not None and (is_due or is_interrupted):
                        save_run(self.svi, self.checkpoint, self.data, is_joint=True)
                    if is_interrupted:
                        self._end_by_signal(interrupts)
                    if wants_stop:
                        break
            except (Exception, NestedInterrupt) as error:
                if not interrupts or group is not None:
                    raise
                # The workers of the loader got the signal, too, and failed. Save no half step.
                self._fill_in_losses()
                if self.checkpoint is not None and not _is_in_step(error):
                    save_run(self.svi, self.checkpoint, self.data)
                interrupts.deliver()
                raise
            finally:
                self._fill_in_losses()

    def _read_losses(self) -> None:
        """Read the losses that are still on the device, and raise an error if one is not finite."""
        self.svi.read_losses()
        self._fill_in_losses()

    def _fill_in_losses(self) -> None:
        """Replace the unread losses of the history by floats."""
        losses: list[Any] = self.svi.history.losses
        start = len(losses)
        while start and isinstance(losses[start - 1], Tensor):
            start -= 1
        losses[start:] = read_together(losses[start:])

    def _wants_stop(self, history: TrainingHistory) -> bool:
        if self.callback is None or isinstance(history.losses[-1], Tensor):
            return False
        callback = self.callback
        if self.group is None:
            return bool(callback(history))
        owner = f"{self.group.owner}.run"
        return any(self.group.processes.results_of_all(lambda: bool(callback(history)), owner))

    def _end_by_signal(self, interrupts: Interrupts) -> None:
        is_here = bool(interrupts)
        interrupts.deliver()
        if self.group is not None and not is_here:
            raise RuntimeError(
                f"{self.group.owner}.run: another process was interrupted, so this one ends, too, "
                f"after step {len(self.svi.history.losses)}."
            )

    def _length(self) -> int | None:
        """Return the number of steps of an epoch; None if it is not known."""
        if self.group is None:
            return length_of(self.data)
        length: int | None = self.group.length_of(self.data)
        return length

    def _steps(self, bar: Any) -> Iterator[None]:
        """Take steps. Pause after each step, and after an epoch that ends without a step."""
        history = self.svi.history
        if history.is_converged:
            return
        while len(history.epoch_ends) < self.num_epochs:
            length = self._length()
            for batch in self._batches(length):
                loss = self._step(batch)
                if loss is None:
                    break
                self._after_step(loss, length, bar)
                yield
                if history.is_epoch_end:
                    break
            if not history.is_epoch_end:  # the data has no length, or ends before it
                self._read_losses()
                history.epoch_ends.append(len(history.losses))
                self.svi._scheduler_steps.at("epoch", self.svi.optim, history.last_epoch_loss)
                yield

    def _step(self, batch: Any) -> float | Tensor | None:
        """Take a step, and return the loss; None if no process has data."""
        if batch is _NO_DATA:
            loss: float | None = self.svi._rest()
            return loss
        args, kwargs = arguments_of(batch)
        found = self.svi.step(*args, *self.args, **kwargs, **self.kwargs)
        return found if isinstance(found, Tensor) else float(found)

    def _batches(self, length: int | None) -> Iterator[Any]:
        """Yield the remaining minibatches of an epoch.

        In a group, go on without data until the epoch ends for all processes.
        """
        with self._awaited():
            batches = self._remaining(length)
            batch = next(batches, _NO_DATA)
        while batch is not _NO_DATA:
            yield batch
            with self._awaited():
                batch = next(batches, _NO_DATA)
        while self.group is not None:
            yield _NO_DATA

    def _awaited(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = (
            nullcontext() if self.group is None else self.group.awaited()
        )
        return context

    def _remaining(self, length: int | None) -> Iterator[Any]:
        svi, history, data = self.svi, self.svi.history, self.data
        done = history.steps_of_epoch
        set_epoch(data, len(history.epoch_ends))
        now = random_states(data)
        if done and svi._epoch_start is not None:
            set_random_states(svi._epoch_start, data)  # for the same order of minibatches
        else:
            svi._epoch_start = now
        batches = minibatches(data)
        num_skipped = sum(1 for _ in itertools.islice(batches, done))
        if done:
            set_random_states(now, data)
        has_any = done > 0 and num_skipped == done and length is None
        for batch in batches:
            has_any = True
            yield batch
        if not has_any and not (num_skipped and self.group is not None):  # others may have more
            raise ValueError(
                f"{type(svi).__name__}.run: data has {num_skipped} minibatches in epoch "
                f"{len(history.epoch_ends) + 1}, but it must have at least {done + 1}. A "
                "generator can be used once only, so pass a list or a DataLoader that is not empty."
            )

    def _after_step(self, loss: float | Tensor, length: int | None, bar: Any) -> None:
        svi, history = self.svi, self.svi.history
        if not isinstance(loss, Tensor) and math.isnan(loss):
            raise ValueError(
                f"{type(svi).__name__}.run: the loss of step {len(history.losses) + 1} is NaN. "
                "Check the data, the parameters and the learning rate. If there is a checkpoint, "
                "it is from an earlier step."
            )
        history.losses.append(loss)
        if history.steps_of_epoch == length:
            history.epoch_ends.append(len(history.losses))
        if history.is_epoch_end or not svi._unread.losses:
            self._read_losses()
        if svi._schedule is not None:
            svi._schedule.step()
        svi._scheduler_steps.at("step", svi.optim, loss)
        if history.is_epoch_end:
            svi._scheduler_steps.at("epoch", svi.optim, history.last_epoch_loss)
        if svi._checks_state:
            check_state(svi)  # some states exist only after a step
            svi._checks_state = False
        if not bar.disable:
            recent = history.losses[-_WINDOW:]
            if not isinstance(recent[-1], Tensor):
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.4g}", refresh=False)
            bar.update()


_NO_DATA = object()


def _is_in_step(error: BaseException) -> bool:
    """Return whether an exception came up inside of a step, and not between two steps."""
    steps = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return "step" in steps or "_after_step" in steps
