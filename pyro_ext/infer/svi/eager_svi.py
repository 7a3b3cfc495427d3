from collections.abc import Collection
from contextlib import nullcontext
from copy import copy
from functools import partial
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.util import torch_item, zero_grads
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_ext._arguments import check_integer
from pyro_ext._files import StrPath
from pyro_ext._private.of_pyro import set_waiting_states
from pyro_ext._random_states import kept_random_states
from pyro_ext.distributed.noise import active_noise
from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer.svi.capture.graph_inputs import params_of
from pyro_ext.infer.svi.checkpoint import read
from pyro_ext.infer.svi.comparison import Comparison
from pyro_ext.infer.svi.history import TrainingHistory
from pyro_ext.infer.svi.joint_optimizer import JointOptimizer
from pyro_ext.infer.svi.minibatches import Data, arguments_of, loader_settings, minibatches
from pyro_ext.infer.svi.optimizer_states import optimizer_states
from pyro_ext.infer.svi.run_loop import Callback, RunLoop, check_run
from pyro_ext.infer.svi.saved_run import check_state, load_run, save_run, schedule_of
from pyro_ext.infer.svi.scheduler_steps import SchedulerSteps
from pyro_ext.infer.svi.training_group import TrainingGroup
from pyro_ext.infer.svi.unread_losses import UnreadLosses, has_late_loss, late_loss
from pyro_ext.tracing import Program
from pyro_ext.tracing.module_calls import called_modules


class EagerSVI(SVI):
    """Pyro's ``SVI`` with a training loop, and with one optimiser for all parameters.

    If ``torch.distributed`` has several processes, they train together. Each process calls the same
    methods with its share of the rows, and the plate keeps the size N of all data, as in
    ``pyro.plate("data", N, subsample=x)``. Parameters begin with the values of rank 0. Losses and
    gradients are means over processes, weighted by their numbers of rows.
    :class:`~pyro_ext.distributed.DistributedNoise` describes their random numbers.
    ``evaluate_loss`` returns the loss of the rows of this process.

    :param model: the model, a callable with Pyro primitives.
    :param guide: the guide, a callable with Pyro primitives.
    :param optim: the optimiser.
    :param loss: an ELBO, or a function that returns a differentiable loss.
    :param reads_loss_every: the number of steps, >= 1, whose losses are read at once. Reading waits
        for a GPU. With 1, ``step`` returns a float. With a larger number, ``step`` returns a tensor
        without dims on the device, and does not wait. Every so many steps it reads the losses, and
        raises a ValueError if one was not finite. A step with such a loss changes no parameters if
        the optimiser is fused, like Adam and AdamW on a CPU or on CUDA. Any other optimiser takes
        this step with gradients of zero. In several processes, each step reads its loss.
    :raises TypeError: if ``loss`` is a class, or ``reads_loss_every`` is no integer.
    :raises ValueError: if ``reads_loss_every`` is below 1.
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

    #: The bytes of a vector of gradients that processes exchange during a backward pass.
    _bucket_bytes: float = 2**20

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: PyroOptim,
        loss: Any,
        reads_loss_every: int = 1,
    ) -> None:
        if isinstance(loss, type):
            raise TypeError(
                f"{type(self).__name__}: the loss is the class {loss.__name__}. Pass an instance "
                f"of it, such as {loss.__name__}()."
            )
        check_integer(type(self).__name__, "reads_loss_every", reads_loss_every, 1)
        super().__init__(model, guide, optim, loss)
        self.history = TrainingHistory()
        self._unread = UnreadLosses(type(self).__name__, reads_loss_every)
        self._optimizer: JointOptimizer | None = None
        #: The modules that the first step called; None before the first step.
        self._called: list[nn.Module] | None = None
        self._epoch_start: dict[str, Any] | None = None
        self._bar: Any = None  # of the latest run
        self._run_settings: dict[str, Any] = {}
        self._scheduler_steps: SchedulerSteps | None = None
        self._checks_state = False
        self._group: TrainingGroup | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Parameters of Pyro's optimisers cannot be pickled, but the optimisers' states can.
        optim = copy(self.optim)
        optim.optim_objs, optim.grad_clip = {}, {}
        set_waiting_states(optim, optimizer_states(self.optim))
        made_anew = dict.fromkeys(("_bar", "_group", "_optimizer"))
        return {**self.__dict__, "optim": optim, **made_anew}

    @property
    def objective(self) -> Any:
        """The ELBO, or the loss function if there is no ELBO."""
        return getattr(self.loss_and_grads, "__self__", self.loss)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step, like ``SVI.step``.

        :param args: positional arguments of model and guide.
        :param kwargs: keyword arguments of model and guide.
        :returns: the loss before the step; a tensor with ``reads_loss_every`` above 1.
        """
        group = self._find_group()
        if (noise := active_noise()) is not None:
            noise.next_step()
        if group is None:
            loss = self._take_step(args, kwargs)
            return self._unread.added(loss) if self._reads_late else loss
        group.start(self, args, kwargs)
        with group.step():
            return self._take_step(args, kwargs)

    def read_losses(self) -> None:
        """Read the losses that are still on the device, after the last step of your own loop.

        :raises ValueError: if a loss was not finite.
        """
        self._unread.read()

    def _take_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._called is not None:
            return self._eager_step(*args, **kwargs)
        with called_modules() as called:
            loss = self._eager_step(*args, **kwargs)
        self._called = called
        return loss

    def _find_group(self) -> TrainingGroup | None:
        processes = current_processes()
        if processes is None:
            self._group = None
        elif self._group is None or self._group.processes != processes:
            self._group = TrainingGroup(processes, type(self).__name__, self._bucket_bytes)
        return self._group

    def _eager_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._group is None and pyro.settings.get("module_local_params"):
            return super().step(*args, **kwargs)
        overlapped = nullcontext() if self._group is None else self._group.overlapped()
        with poutine.trace(param_only=True) as trace, overlapped:
            loss = self._loss_with_gradients(args, kwargs)
        used = params_of(trace.trace)
        params = list(dict.fromkeys(used.values()))  # tied parameters once
        if self._group is not None:
            loss, params = self._mean_in_place(loss, used)
        self._update(params, loss)
        zero_grads(params)
        return loss

    def _loss_with_gradients(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the gradients, and return the loss; on the device if it is read later."""
        if self._reads_late and has_late_loss(self.objective):
            return late_loss(self.objective, self.model, self.guide, args, kwargs)
        loss = self.loss_and_grads(self.model, self.guide, *args, **kwargs)
        if self._reads_late and isinstance(loss, Tensor):
            return loss.detach()
        return type(loss)(map(torch_item, loss)) if isinstance(loss, tuple) else torch_item(loss)

    @property
    def _reads_late(self) -> bool:
        return self._unread.every > 1 and self._group is None

    def _mean_in_place(
        self, loss: Any, params: dict[str, Tensor], rows: list[int] | None = None
    ) -> tuple[Any, list[Tensor]]:
        """Replace gradients by their means over processes.

        :param loss: the loss, or several losses.
        :param params: the parameters that this process has used, by name.
        :param rows: the numbers of rows in the plates that are divided over processes. With None,
            those of the latest run of the programs.
        :returns: the mean loss, and the parameters with gradients in any process.
        """
        assert self._group is not None
        losses = tuple(map(torch_item, loss)) if isinstance(loss, tuple) else (torch_item(loss),)
        own = {name: param.grad for name, param in params.items()}
        means, params, gradients = self._group.mean(losses, params, own, rows)
        self._set_gradients(params, gradients)
        return type(loss)(means) if isinstance(loss, tuple) else means[0], [*params.values()]

    def _set_gradients(self, params: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        for name, param in params.items():
            param.grad = gradients[name]

    def _rest(self) -> float | None:
        """Take part in a step without data, and return the loss; None if nobody has data."""
        assert self._group is not None
        found = self._group.rest()
        if found is None:
            return None
        loss, params, gradients = found
        self._set_gradients(params, gradients)
        self._update([*params.values()])
        zero_grads(params.values())
        return loss

    def _update(self, params: list[Tensor], loss: Any = None) -> None:
        """Step the parameters, unless a loss that is read later is not finite."""
        if pyro.settings.get("module_local_params"):
            self.optim(params)
            return
        if self._optimizer is None or self._optimizer.optim is not self.optim:
            self._optimizer = JointOptimizer(self.optim)
        self._optimizer.step(params, loss if isinstance(loss, Tensor) else None)

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

        With several processes, a plain ``DataLoader`` gets a ``DistributedSampler``, and its
        ``batch_size`` is the number of rows of each process. Other data must be the share of the
        process. The epoch lasts until no process has minibatches. Rank 0 shows the progress bar,
        and reads and writes the checkpoints. The run ends for all if the callback of one process
        returns True, or after an interrupt of one. An error in one process is an error in all.

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
            nothing has been changed. With several processes, also if they train different
            programs, if a plate has no more rows than a process passes, and if the loss is not
            finite.
        :raises RuntimeError: if another process fails, ends or does not answer.
        :raises OSError: if ``resume`` cannot be read, or ``checkpoint`` cannot be written.
        :raises KeyboardInterrupt: after an interrupt.
        """
        owner = f"{type(self).__name__}.run"
        kwargs = kwargs or {}
        scheduler_steps = SchedulerSteps(owner, step_scheduler)
        comparison = Comparison(resume, allow_changes)
        group = self._find_group()
        check = partial(check_run, owner, data, num_epochs, checkpoint, checkpoint_every)
        if group is None:
            check()
        else:
            agreed = group.agree(
                owner,
                partial(check, is_written=group.is_first),  # rank 0 reads and writes the files
                num_epochs=num_epochs,
                has_callback=callback is not None,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
                resume=resume,
            )
            checkpoint, checkpoint_every = agreed["checkpoint"], agreed["checkpoint_every"]
            resume = agreed["resume"]
            if callback is None and agreed["has_callback"]:
                callback = lambda history: False  # noqa: E731
            group.new_run()
            given, data = data, group.data_of_process(owner, data)
        settings = loader_settings(data) | scheduler_steps.settings(self.optim)
        if group is not None:
            settings["loader.length"] = group.length_of(data)
        if resume is None:
            self.history, self._epoch_start = TrainingHistory(), None
        elif group is None:
            self._resume(read(resume), comparison, data, args, kwargs, settings)
        else:
            path = resume
            content = group.processes.result_of_first(lambda: read(path), owner)
            restore = partial(self._resume, content, comparison, data, args, kwargs, settings)
            group.processes.results_of_all(restore, owner)
            data = group.data_of_process(owner, given)  # in the order of the checkpoint
        self._run_settings, self._scheduler_steps = settings, scheduler_steps
        if checkpoint is not None:
            check_state(self)
        self._checks_state = checkpoint is not None
        loop = RunLoop(self, data, num_epochs, args, kwargs, callback, checkpoint, checkpoint_every)
        loop.run(progress_bar)
        self._end_run()
        return self.history

    def _end_run(self) -> None:
        """Do what a kind of SVI does at the end of a complete run."""

    def _resume(
        self,
        content: dict[str, Any],
        comparison: Comparison,
        data: Data,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        with kept_random_states(0, data):
            batch_args, batch_kwargs = arguments_of(next(minibatches(data), ()))
        args, kwargs = (*batch_args, *args), {**batch_kwargs, **kwargs}
        load_run(self, content, comparison, args, kwargs, data, settings)
        if self._group is not None:
            self._group.start(self, args, kwargs)  # before a process that has no data left rests

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
        load_run(self, read(path), Comparison(path, allow_changes), args, kwargs)

    @property
    def _schedule(self) -> Any:
        return schedule_of(self.objective)
