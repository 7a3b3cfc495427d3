import itertools
import math
import signal
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ext._arguments import check_integer, describe
from pyro_ext._files import StrPath, check_writable
from pyro_ext._interruption import NestedInterrupt, postponed_interrupts
from pyro_ext._private.of_pyro import set_waiting_states
from pyro_ext._random_states import kept_random_states, random_states, set_random_states
from pyro_ext.infer.svi.comparison import Comparison
from pyro_ext.infer.svi.history import TrainingHistory
from pyro_ext.infer.svi.minibatches import (
    Data,
    arguments_of,
    length_of,
    loader_settings,
    minibatches,
)
from pyro_ext.infer.svi.optimizer_states import optimizer_states
from pyro_ext.infer.svi.saved_run import check_state, load_run, save_run, schedule_of
from pyro_ext.infer.svi.scheduler_steps import SchedulerSteps
from pyro_ext.tracing import Program
from pyro_ext.tracing.module_calls import called_modules

Callback = Callable[[TrainingHistory], Any]

_WINDOW = 50  # steps that the loss of the progress bar averages


class EagerSVI(SVI):
    """Pyro's ``SVI`` with a training loop.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, a callable with Pyro primitives.
    :param optim: the optimiser.
    :param loss: an ELBO, or a function that returns a differentiable loss.
    :ivar history: the :class:`TrainingHistory` of the current run, or of the last run.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from torch.utils.data import DataLoader
    >>> from pyro_ext.infer import ImportanceWeightedELBO
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(0.0))
    ...     with pyro.plate("data", 100, subsample=x):
    ...         z = pyro.sample("z", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     slope = pyro.param("slope", torch.tensor(0.5))
    ...     with pyro.plate("data", 100, subsample=x):
    ...         pyro.sample("z", dist.Normal(slope * x, 0.7))
    >>> loader = DataLoader(torch.randn(100), batch_size=50, shuffle=True)
    >>> svi = EagerSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(4))
    >>> history = svi.run(loader, num_epochs=3, progress_bar=False)
    >>> len(history.losses), len(history.epoch_losses)
    (6, 3)
    """

    def __init__(self, model: Program, guide: Program, optim: PyroOptim, loss: Any) -> None:
        if isinstance(loss, type):
            raise TypeError(
                f"{type(self).__name__}: the loss is the class {loss.__name__}. Pass an instance "
                f"of it, such as {loss.__name__}()."
            )
        super().__init__(model, guide, optim, loss)
        self.history = TrainingHistory()
        #: The modules that the first step called; None before the first step.
        self._called: list[nn.Module] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._bar: Any = None  # the progress bar of the latest run
        self._run_settings: dict[str, Any] = {}
        self._scheduler_steps: SchedulerSteps | None = None
        self._checks_state = False

    def __getstate__(self) -> dict[str, Any]:
        # Parameters of Pyro's optimisers cannot be pickled, but the optimisers' states can.
        optim = copy(self.optim)
        optim.optim_objs, optim.grad_clip = {}, {}
        set_waiting_states(optim, optimizer_states(self.optim))
        return {**self.__dict__, "optim": optim, "_bar": None}

    @property
    def objective(self) -> Any:
        """The ELBO, or the loss function if there is no ELBO."""
        return getattr(self.loss_and_grads, "__self__", self.loss)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, like ``SVI.step``.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss before the step.
        """
        if self._called is not None:
            return self._eager_step(*args, **kwargs)
        with called_modules() as called:
            loss = self._eager_step(*args, **kwargs)
        self._called = called
        return loss

    def _eager_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)

    def run(
        self,
        data: Data,
        num_epochs: int = 1,
        progress_bar: bool = True,
        callback: Callback | None = None,
        *,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        checkpoint: StrPath | None = None,
        checkpoint_every: int | None = None,
        resume: StrPath | None = None,
        allow_changes: Collection[str] = (),
        step_scheduler: str | None = "epoch",
    ) -> TrainingHistory:
        """Train for a number of steps or epochs.

        After an interrupt (Ctrl-C), the run finishes the step, writes the checkpoint if there is
        one, and raises ``KeyboardInterrupt``. A second interrupt ends it at once. SIGTERM is
        postponed in the same way, and then does what it usually does: by default, it ends the
        process. If you have a handler that returns, the run goes on after it. The KL schedule
        of a :class:`KLWeightedELBO` advances after each step. Pyro's schedulers of learning rates
        advance after each epoch, before the callback. Do not step them in the callback.

        :param data: the number of steps of an epoch, >= 1, or an iterable of minibatches such as a
            ``DataLoader``. A minibatch that is a tuple or list is passed as the first positional
            arguments of model and guide. A dict is passed as keyword arguments. Any other minibatch
            is the first argument.
        :param num_epochs: the number of passes through the data, >= 1. With ``resume``, it includes
            the epochs before the checkpoint.
        :param progress_bar: whether to show a progress bar, with a running mean of the loss.
        :param callback: a function of the :class:`TrainingHistory`, such as
            :class:`EarlyStopping`. It is called after each step. If it returns True, the run ends.
            If ``data`` has no length, it is called once more at the end of each epoch.
        :param args: further positional arguments of model and guide, after those of the minibatch.
        :param kwargs: keyword arguments of model and guide.
        :param checkpoint: the file to which the run is saved at the end of each epoch, at the end
            of the run, and after an interrupt. None saves nothing.
        :param checkpoint_every: the number of steps, >= 1, after which to save as well. None saves
            at the times above only.
        :param resume: a checkpoint from which to continue. On a CPU, the resumed run equals an
            uninterrupted run to the last bit. A run that :class:`EarlyStopping` ended takes no
            further steps. Persistent workers of a data loader start again, and so do their random
            numbers.
        :param allow_changes: names of settings that may differ from those of ``resume``, such as
            ``["optimizer.lr"]``. The error about a difference gives its name. The run goes on with
            the values of now. ``"optimizer"`` stands for all settings of the optimiser. Another
            class of optimiser starts without a state.
        :param step_scheduler: when to step a learning-rate scheduler of Pyro: after each
            ``"epoch"``, after each ``"step"``, or never (None). ``ReduceLROnPlateau`` gets the mean
            loss of the epoch, or the loss of the step.
        :returns: the history. It includes the steps before ``resume``.
        :raises TypeError: if an argument has the wrong type, or if the state has an object that a
            file cannot hold, such as an object in the state of an optimiser of your own.
        :raises ValueError: if an argument is out of range, if the data has no minibatches or fewer
            than before ``resume``, if ``resume`` is damaged, if it does not fit the model, guide,
            optimiser, objective and data, or if the loss is NaN. If ``resume`` does not fit,
            nothing has been changed.
        :raises OSError: if ``resume`` cannot be read, or ``checkpoint`` cannot be written.
        :raises KeyboardInterrupt: after an interrupt.
        """
        self._check(data, num_epochs, checkpoint, checkpoint_every)
        kwargs = kwargs or {}
        scheduler_steps = SchedulerSteps(f"{type(self).__name__}.run", step_scheduler)
        settings = loader_settings(data) | scheduler_steps.settings(self.optim)
        comparison = Comparison(resume, allow_changes)
        if resume is None:
            self.history, self._epoch_start = TrainingHistory(), None
        else:
            self._resume(resume, comparison, data, args, kwargs, settings)
        self._run_settings, self._scheduler_steps = settings, scheduler_steps
        if checkpoint is not None:
            check_state(self)
        self._checks_state = checkpoint is not None
        length = length_of(data)
        bar = self._bar = tqdm(
            total=None if length is None else num_epochs * length,
            initial=len(self.history.losses),
            disable=not progress_bar,
            unit="step",
        )
        with postponed_interrupts(signal.SIGINT, signal.SIGTERM) as interrupts, bar:
            try:
                for _ in self._steps(data, num_epochs, args, kwargs, bar):
                    wants_stop = callback is not None and bool(callback(self.history))
                    is_due = self.history.is_epoch_end or wants_stop
                    if checkpoint_every is not None:
                        is_due = is_due or len(self.history.losses) % checkpoint_every == 0
                    is_interrupted = bool(interrupts)
                    if checkpoint is not None and (is_due or is_interrupted):
                        save_run(self, checkpoint, data)
                    if is_interrupted:
                        interrupts.deliver()
                    if wants_stop:
                        break
            except (Exception, NestedInterrupt) as error:
                if not interrupts:
                    raise
                # The workers of the loader got the signal, too, and failed. Save no half step.
                if checkpoint is not None and not _is_in_step(error):
                    save_run(self, checkpoint, data)
                interrupts.deliver()
                raise
        self._end_run()
        return self.history

    def _end_run(self) -> None:
        """Do what a kind of SVI does at the end of a complete run."""

    def _resume(
        self,
        path: StrPath,
        comparison: Comparison,
        data: Data,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        with kept_random_states(0, data):
            batch_args, batch_kwargs = arguments_of(next(minibatches(data), ()))
        args, kwargs = (*batch_args, *args), {**batch_kwargs, **kwargs}
        load_run(self, path, comparison, args, kwargs, data, settings)

    def save(self, path: StrPath) -> None:
        """Save the state of the training run to a file.

        The file holds the param store, the parameters and buffers of modules, the states of the
        optimisers and of the random number generators, the step of the KL schedule, and the
        history.

        :param path: the path of the file.
        :raises OSError: if the file cannot be written.
        """
        save_run(self, path)

    def load(
        self, path: StrPath, *args: Any, allow_changes: Collection[str] = (), **kwargs: Any
    ) -> None:
        """Load a file that :meth:`save` or :meth:`run` wrote for the same model and guide.

        The optimiser and the objective must be the same, too. Model and guide run once, to create
        their parameters and modules. That run has no other effect. No code of the file runs.

        :param path: the path of the file.
        :param args: positional arguments of model and guide.
        :param allow_changes: names of settings that may differ, as for :meth:`run`.
        :param kwargs: keyword arguments of model and guide.
        :raises TypeError: if ``allow_changes`` is not a list of names.
        :raises ValueError: if the file is not a checkpoint, is damaged, or does not fit the model,
            guide, optimiser and objective. Nothing has been changed then.
        :raises OSError: if the file cannot be read.
        """
        load_run(self, path, Comparison(path, allow_changes), args, kwargs)

    @property
    def _schedule(self) -> Any:
        return schedule_of(self.objective)

    def _check(
        self, data: Data, num_epochs: int, checkpoint: Any, checkpoint_every: int | None
    ) -> None:
        owner = f"{type(self).__name__}.run"
        if isinstance(data, int):
            check_integer(owner, "data (a number of steps)", data, 1)
        elif isinstance(data, Tensor) or not isinstance(data, Iterable):
            raise TypeError(
                f"{owner}: data must be a number of steps or an iterable of minibatches, but it "
                f"is {describe(data)}. If each step uses all data, pass the number of steps, and "
                "the data as args=(x,)."
            )
        check_integer(owner, "num_epochs", num_epochs, 1)
        if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
            raise ValueError(
                f"{owner}: the folder of checkpoint='{checkpoint}' does not exist. Create it first."
            )
        if checkpoint is not None:
            check_writable(checkpoint)
        if checkpoint_every is not None:
            check_integer(owner, "checkpoint_every", checkpoint_every, 1)
            if checkpoint is None:
                raise ValueError(
                    f"{owner}: checkpoint_every needs a checkpoint. Pass the path of a file as "
                    "checkpoint=."
                )

    def _steps(
        self,
        data: Data,
        num_epochs: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bar: Any,
    ) -> Iterator[None]:
        """Take steps. Pause after each step, and after an epoch that ends without a step."""
        history = self.history
        if history.is_converged:
            return
        while len(history.epoch_ends) < num_epochs:
            length = length_of(data)
            for batch in self._batches(data, length):
                batch_args, batch_kwargs = arguments_of(batch)
                loss = float(self.step(*batch_args, *args, **batch_kwargs, **kwargs))
                self._after_step(loss, length, bar)
                yield
                if history.is_epoch_end:
                    break
            else:  # the data has no length, or ends before it
                history.epoch_ends.append(len(history.losses))
                self._step_scheduler("epoch", history.last_epoch_loss)
                yield

    def _batches(self, data: Data, length: int | None) -> Iterator[Any]:
        """Yield the remaining minibatches of an epoch."""
        done = self.history.steps_of_epoch
        now = random_states(data)
        if done and self._epoch_start is not None:
            set_random_states(self._epoch_start, data)  # for the same order of minibatches
        else:
            self._epoch_start = now
        batches = minibatches(data)
        num_skipped = sum(1 for _ in itertools.islice(batches, done))
        if done:
            set_random_states(now, data)
        has_any = done > 0 and num_skipped == done and length is None
        for batch in batches:
            has_any = True
            yield batch
        if not has_any:
            raise ValueError(
                f"{type(self).__name__}.run: data has {num_skipped} minibatches in epoch "
                f"{len(self.history.epoch_ends) + 1}, but it must have at least {done + 1}. A "
                "generator can be used once only, so pass a list or a DataLoader that is not empty."
            )

    def _after_step(self, loss: float, length: int | None, bar: Any) -> None:
        history = self.history
        if math.isnan(loss):
            raise ValueError(
                f"{type(self).__name__}.run: the loss of step {len(history.losses) + 1} is NaN. "
                "Check the data, the parameters and the learning rate. If there is a checkpoint, "
                "it is from an earlier step."
            )
        history.losses.append(loss)
        if history.steps_of_epoch == length:
            history.epoch_ends.append(len(history.losses))
        if self._schedule is not None:
            self._schedule.step()
        self._step_scheduler("step", loss)
        if history.is_epoch_end:
            self._step_scheduler("epoch", history.last_epoch_loss)
        if self._checks_state:
            check_state(self)  # some states exist only after a step
            self._checks_state = False
        if not bar.disable:
            recent = history.losses[-_WINDOW:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4g}", refresh=False)
            bar.update()

    def _step_scheduler(self, time: str, loss: float) -> None:
        if self._scheduler_steps is not None:
            self._scheduler_steps.at(time, self.optim, loss)


def _is_in_step(error: BaseException) -> bool:
    """Return whether an exception came up inside of a step, and not between two steps."""
    steps = (frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
    return "step" in steps or "_after_step" in steps
