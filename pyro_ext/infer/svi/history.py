from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from pyro_ext._arguments import check_integer
from pyro_ext._figures import axes_or_new


@dataclass
class TrainingHistory:
    """The losses of a training run.

    .. attribute:: losses

        The loss of each step.

    .. attribute:: epoch_ends

        The number of steps that were taken by the end of each epoch.

    .. attribute:: evaluations

        Pairs of a number of steps and the loss that :class:`EarlyStopping` looked at.

    .. attribute:: is_converged

        Whether :class:`EarlyStopping` ended the run.

    >>> history = TrainingHistory(losses=[4.0, 2.0, 1.0, 2.0], epoch_ends=[2, 4])
    >>> history.epoch_losses
    [3.0, 1.5]
    """

    losses: list[float] = field(default_factory=list)
    epoch_ends: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    is_converged: bool = False

    @property
    def is_epoch_end(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return bool(self.epoch_ends) and self.epoch_ends[-1] == len(self.losses)

    @property
    def steps_of_epoch(self) -> int:
        """The number of steps since the last complete epoch."""
        return len(self.losses) - (self.epoch_ends or [0])[-1]

    @property
    def epoch_losses(self) -> list[float]:
        """The mean loss of the steps of each complete epoch."""
        bounds = pairwise([0, *self.epoch_ends])
        return [float(np.mean(self.losses[start:end])) for start, end in bounds]

    def plot(self, ax: Any = None) -> Any:
        """Draws the losses, their means over epochs, and the evaluations.

        :param ax: matplotlib axes; new ones if None.
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
    """A callback of a training run that stops it once the loss does not get better.

    At the end of each epoch it compares a loss with the best one so far.

    :param int patience: after how many epochs >= 1 without a better loss to stop.
    :param float min_improvement: how much smaller a better loss is at least, in nats.
    :param evaluate: a function without arguments that returns the loss, such as one of held-out
        data; None for the mean loss of the epoch's steps.
    :raises ValueError: where an argument is out of range.

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

    def __post_init__(self) -> None:
        check_integer("EarlyStopping", "patience", self.patience, 1)
        if not self.min_improvement >= 0:
            raise ValueError(
                f"EarlyStopping: expected min_improvement >= 0, got {self.min_improvement!r}."
            )

    def __call__(self, history: TrainingHistory) -> bool:
        """Whether to stop.

        :param TrainingHistory history: what a run hands to its callback.
        """
        if not history.is_epoch_end:
            return False
        loss = history.epoch_losses[-1] if self.evaluate is None else float(self.evaluate())
        history.evaluations.append((len(history.losses), loss))
        best, best_index = float("inf"), 0
        for index, (_, value) in enumerate(history.evaluations):
            if value < best - self.min_improvement:
                best, best_index = value, index
        history.is_converged = len(history.evaluations) - 1 - best_index >= self.patience
        return history.is_converged
