import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from pyro_ext._arguments import check_integer, check_real
from pyro_ext._figures import axes_or_new
from pyro_ext.distributed.processes import current_processes


@dataclass
class TrainingHistory:
    """The losses of a training run.

    :ivar losses: the loss of each step, in nats for an ELBO.
    :ivar epoch_ends: the number of steps since the start of the run, at the end of each epoch.
    :ivar evaluations: the losses that :class:`EarlyStopping` compared. Each entry is a number of
        steps and the loss after them.
    :ivar is_converged: whether :class:`EarlyStopping` ended the run.
    :ivar num_eager_steps: the number of steps that :class:`CompiledSVI` took without a graph.
    :ivar events: the captures and evictions of :class:`CompiledSVI`, and its reasons for eager
        steps. Each entry is a number of steps and a text.

    >>> history = TrainingHistory(losses=[4.0, 2.0, 1.0, 2.0], epoch_ends=[2, 4])
    >>> history.epoch_losses
    [3.0, 1.5]
    """

    losses: list[float] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    is_converged: bool = False
    num_eager_steps: int = 0
    events: list[tuple[int, str]] = field(default_factory=list, compare=False)  # with durations

    @property
    def is_epoch_end(self) -> bool:
        """Whether the last step completed an epoch."""
        return bool(self.epoch_ends) and self.epoch_ends[-1] == len(self.losses)

    @property
    def steps_of_epoch(self) -> int:
        """The number of steps since the end of the last complete epoch."""
        return len(self.losses) - (self.epoch_ends or [0])[-1]

    @property
    def epoch_losses(self) -> list[float]:
        """The mean loss over the steps of each complete epoch."""
        return [self._mean(start, end) for start, end in pairwise([0, *self.epoch_ends])]

    @property
    def last_epoch_loss(self) -> float:
        """The mean loss over the steps of the last complete epoch.

        :raises IndexError: if no epoch is complete.
        """
        start = self.epoch_ends[-2] if len(self.epoch_ends) > 1 else 0
        return self._mean(start, self.epoch_ends[-1])

    def state_dict(self) -> dict[str, Any]:
        """Return the history as tensors, numbers and lists, for a file."""
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "epoch_ends": list(self.epoch_ends),
            "evaluations": [[steps, float(loss)] for steps, loss in self.evaluations],
            "is_converged": bool(self.is_converged),
            "num_eager_steps": self.num_eager_steps,
            "events": [list(event) for event in self.events],
        }

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any]) -> "TrainingHistory":
        """Return the history of which :meth:`state_dict` gave the state.

        :param state_dict: the state.
        """
        changed = {"losses": state_dict["losses"].tolist()}
        for key in ("evaluations", "events"):
            changed[key] = [(steps, value) for steps, value in state_dict.get(key, [])]
        return cls(**{**state_dict, **changed})

    def _mean(self, start: int, end: int) -> float:
        return float(np.mean(self.losses[start:end]))

    def plot(self, ax: Any = None) -> Any:
        """Plot the losses, their means over epochs, and the evaluations.

        :param ax: the matplotlib axes to draw on. None makes new ones.
        :returns: the axes.
        """
        ax = axes_or_new(ax)
        steps = np.arange(1, len(self.losses) + 1)
        ax.plot(steps, self.losses, linewidth=0.5, alpha=0.5, label="step")
        if len(self.epoch_ends) > 1:
            ax.plot(self.epoch_ends, self.epoch_losses, label="mean of an epoch")
        if self.evaluations:
            ax.plot(*zip(*self.evaluations, strict=True), "o-", label="evaluation")
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


@dataclass(eq=False)
class EarlyStopping:
    """A callback that ends a training run when the loss no longer improves.

    At the end of each epoch, it compares a loss with the best loss so far.

    :param patience: the number of epochs without improvement, >= 1, after which to stop.
    :param min_improvement: the smallest decrease of the loss that counts as an improvement, >= 0,
        in nats for an ELBO.
    :param evaluate: a function without arguments that returns the loss, such as the loss of
        held-out data. None uses the mean loss over the steps of the epoch. With several processes,
        the mean over processes counts.
    :raises TypeError: if ``patience`` is not an integer, or ``min_improvement`` is not a number.
    :raises ValueError: if an argument is out of range.

    >>> stopping = EarlyStopping(patience=2)
    >>> history = TrainingHistory()
    >>> for loss in [3.0, 1.0, 2.0, 2.0]:
    ...     history.losses.append(loss)
    ...     history.epoch_ends.append(len(history.losses))
    ...     print(stopping(history))
    False
    False
    False
    True
    """

    patience: int = 5
    min_improvement: float = 0.0
    evaluate: Callable[[], float] | None = None
    _best: "_BestSoFar | None" = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer("EarlyStopping", "patience", self.patience, 1)
        check_real("EarlyStopping", "min_improvement", self.min_improvement, 0.0, math.inf)

    def __call__(self, history: TrainingHistory) -> bool:
        """Return whether to stop, and record the evaluation in the history.

        :param history: the history of the run.
        :returns: whether to stop; False if the last step did not complete an epoch.
        """
        if not history.is_epoch_end:
            return False
        loss = history.last_epoch_loss if self.evaluate is None else self._mean(self.evaluate)
        history.evaluations.append((len(history.losses), loss))
        if self._best is None or not self._best.is_of(history, self.min_improvement):
            self._best = _BestSoFar(history.evaluations, self.min_improvement)
        best_index = self._best.update()
        history.is_converged = len(history.evaluations) - 1 - best_index >= self.patience
        return history.is_converged

    @staticmethod
    def _mean(evaluate: Callable[[], float]) -> float:
        """Return the mean of an evaluation over processes."""
        processes = current_processes()
        if processes is None:
            return float(evaluate())
        losses = processes.results_of_all(lambda: float(evaluate()), "EarlyStopping")
        return sum(losses) / len(losses)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_best": None}


@dataclass
class _BestSoFar:
    """The best of a growing list of evaluations. Each evaluation is looked at once."""

    evaluations: list[tuple[int, float]]
    min_improvement: float
    num_seen: int = 0
    last: tuple[int, float] | None = None
    value: float = math.inf
    index: int = 0

    def is_of(self, history: TrainingHistory, min_improvement: float) -> bool:
        """Return whether this is the best of a history, to which entries were only added."""
        return (
            history.evaluations is self.evaluations
            and min_improvement == self.min_improvement
            and len(self.evaluations) >= self.num_seen
            and (self.num_seen == 0 or self.evaluations[self.num_seen - 1] is self.last)
        )

    def update(self) -> int:
        """Look at the new evaluations, and return the index of the best one."""
        for index in range(self.num_seen, len(self.evaluations)):
            value = self.evaluations[index][1]
            if value < self.value - self.min_improvement:
                self.value, self.index = value, index
        self.num_seen, self.last = len(self.evaluations), self.evaluations[-1]
        return self.index
