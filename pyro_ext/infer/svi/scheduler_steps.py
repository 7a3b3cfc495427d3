"""Steps the learning-rate schedulers of Pyro during a training run."""

import warnings
from dataclasses import dataclass
from typing import Any

from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_ext._arguments import describe

_TIMES = ("epoch", "step")


@dataclass
class SchedulerSteps:
    """Steps a ``PyroLRScheduler`` at the end of epochs or of steps.

    :param owner: the name of the function that has the argument, for an error message.
    :param time: ``"epoch"``, ``"step"``, or None for never.
    :raises ValueError: if ``time`` is something else.
    """

    owner: str
    time: str | None
    #: One of the schedulers, by identity, and the number of steps that it had taken.
    _last: tuple[int, int] | None = None
    _has_warned: bool = False

    def __post_init__(self) -> None:
        if self.time is not None and self.time not in _TIMES:
            raise ValueError(
                f"{self.owner}: step_scheduler must be 'epoch', 'step' or None, but it is "
                f"{describe(self.time)}."
            )

    def settings(self, optim: PyroOptim) -> dict[str, Any]:
        """Return the setting that a resumed run must have as well."""
        return {"step_scheduler": self.time} if isinstance(optim, PyroLRScheduler) else {}

    def at(self, time: str, optim: PyroOptim, loss: float | Tensor) -> None:
        """Step the schedulers if it is time.

        :param time: ``"epoch"`` or ``"step"``, at the end of one.
        :param optim: the optimiser.
        :param loss: the loss of the epoch or step, for a scheduler that follows it.
        """
        if time != self.time or not isinstance(optim, PyroLRScheduler) or not optim.optim_objs:
            return
        schedulers = list(optim.optim_objs.values())
        if self._last is not None and self._last[0] == id(schedulers[0]):
            self._check(getattr(schedulers[0], "last_epoch", 0))
        follows_loss = any(isinstance(x, ReduceLROnPlateau) for x in schedulers)
        optim.step(*([loss] if follows_loss else []))
        self._last = id(schedulers[0]), getattr(schedulers[0], "last_epoch", 0)

    def _check(self, num_steps: int) -> None:
        """Warn once if the user steps the scheduler as well."""
        if self._last is not None and num_steps != self._last[1] and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.owner}: the learning-rate scheduler was also stepped elsewhere, perhaps in "
                "the callback. run steps it. Remove optim.step() from your code, or pass "
                "step_scheduler=None.",
                stacklevel=6,
            )
