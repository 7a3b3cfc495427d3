"""Schedules for the weight of the KL term."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from pyro_ext._arguments import abbreviate, check_integer, check_real


class KLSchedule(ABC):
    """The base class of schedules, which give a factor for the KL term at each optimiser step.

    A subclass defines :meth:`factor_at` and :attr:`finished`. Call :meth:`step` after each
    optimiser step, as with the schedulers of torch. Only :meth:`EagerSVI.run` calls it for you.

    .. attribute:: num_steps_taken

        The number of calls of :meth:`step`.

    .. attribute:: is_in_use

        Whether an objective uses the schedule. A schedule belongs to one objective only.

    >>> schedule = LinearKL(num_steps=4)
    >>> factors = []
    >>> for _ in range(6):
    ...     factors.append(schedule.factor)
    ...     schedule.step()
    >>> factors
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self) -> None:
        self.num_steps_taken = 0
        self.is_in_use = False
        self._factor_tensor: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_in_use": False}

    @abstractmethod
    def factor_at(self, step: int) -> float:
        """Return the factor at an optimiser step.

        :param step: the index of the step; 0 for the first step.
        """
        raise NotImplementedError

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the factor stays 1 from the current step on."""
        raise NotImplementedError

    @property
    def factor(self) -> float:
        """The factor at the current step."""
        return self.factor_at(self.num_steps_taken)

    @property
    def factor_tensor(self) -> Tensor:
        """The factor as a float64 tensor without dims, which :meth:`step` updates in place."""
        if self._factor_tensor is None:
            self._factor_tensor = torch.tensor(self.factor, dtype=torch.float64)
        return self._factor_tensor

    def step(self) -> None:
        """Move on to the next optimiser step."""
        self._go_to(self.num_steps_taken + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that :meth:`load_state_dict` needs: the number of steps taken."""
        return {"num_steps_taken": self.num_steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Move to the step at which a state was saved.

        :param state_dict: a result of :meth:`state_dict`, from a schedule with the same arguments.
        :raises TypeError: if the number of steps is not an integer.
        :raises ValueError: if the keys are not those of :meth:`state_dict`, or if the number of
            steps is negative.
        """
        if set(state_dict) != {"num_steps_taken"}:
            raise ValueError(
                f"{type(self).__name__}: the state must have the key 'num_steps_taken' alone, but "
                f"it has {abbreviate(sorted(state_dict))}. Pass a result of state_dict."
            )
        check_integer(type(self).__name__, "num_steps_taken", state_dict["num_steps_taken"], 0)
        self._go_to(state_dict["num_steps_taken"])

    def _go_to(self, step: int) -> None:
        self.num_steps_taken = step
        if self._factor_tensor is not None:
            self._factor_tensor.fill_(self.factor)


class UniformKL(KLSchedule):
    """The plain ELBO, with a factor that is always 1.

    >>> UniformKL().factor
    1.0
    """

    def factor_at(self, step: int) -> float:
        """Return 1, the factor at every optimiser step.

        :param step: the index of the step; 0 for the first step.
        """
        return 1.0

    @property
    def finished(self) -> bool:
        """Whether the factor stays 1 from the current step on; always True."""
        return True


class GeometricKL(KLSchedule):
    r"""The minibatch weights of Bayes by Backprop, which halve from each minibatch to the next.

    .. math:: \mathrm{factor}_i = M \pi_i, \qquad \pi_i = \frac{2^{M - i}}{2^M - 1},
        \qquad i = 1, \dots, M

    Pyro scales the likelihood of a minibatch to the full data. The factor M makes the mean loss of
    an epoch equal to the loss of the plain ELBO. The next epoch starts again with i = 1. The first
    minibatches carry nearly all of the KL term. From the 1075th minibatch on, the factor rounds to
    0.

    :param num_batches: the number M >= 1 of minibatches in an epoch.
    :raises TypeError: if ``num_batches`` is not an integer.
    :raises ValueError: if ``num_batches`` is less than 1.

    Source: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks, section 3.4.

    >>> schedule = GeometricKL(num_batches=2)
    >>> schedule.factor_at(0), schedule.factor_at(1), schedule.factor_at(2)
    (1.3333333333333333, 0.6666666666666666, 1.3333333333333333)
    """

    def __init__(self, num_batches: int) -> None:
        check_integer("GeometricKL", "num_batches", num_batches, 1)
        self.num_batches = num_batches
        super().__init__()

    def factor_at(self, step: int) -> float:
        """Return the factor at an optimiser step, by its position in the epoch.

        :param step: the index of the step; 0 for the first step.
        """
        # Both powers are divided by 2^M, so that nothing overflows.
        powers = math.ldexp(1.0, -(step % self.num_batches) - 1)
        return self.num_batches * (powers / (1.0 - math.ldexp(1.0, -self.num_batches)))

    @property
    def finished(self) -> bool:
        """Whether the factor stays 1 from the current step on; True for a single minibatch."""
        return self.num_batches == 1


class LinearKL(KLSchedule):
    r"""A linear warm-up: the factor rises to 1 and stays there.

    .. math:: \mathrm{factor}_t = s + (1 - s) \min(t / T, 1), \qquad t = 0, 1, \dots

    :param num_steps: the number T >= 1 of steps after which the factor is 1.
    :param start: the first factor s, in [0, 1].
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio (2016), Generating Sentences from a
    Continuous Space.

    >>> [LinearKL(num_steps=2, start=0.5).factor_at(step) for step in range(4)]
    [0.5, 0.75, 1.0, 1.0]
    """

    def __init__(self, num_steps: int, start: float = 0.0) -> None:
        check_integer("LinearKL", "num_steps", num_steps, 1)
        check_real("LinearKL", "start", start, 0.0, 1.0)
        self.num_steps = num_steps
        self.start = start
        super().__init__()

    def factor_at(self, step: int) -> float:
        """Return the factor at an optimiser step.

        :param step: the index of the step; 0 for the first step.
        """
        if step >= self.num_steps:
            return 1.0
        return self.start + (1.0 - self.start) * step / self.num_steps

    @property
    def finished(self) -> bool:
        """Whether the factor stays 1 from the current step on."""
        return self.num_steps_taken >= self.num_steps


class CyclicalKL(KLSchedule):
    r"""Repeated linear warm-ups: in each cycle the factor rises to 1 and stays there for a while.

    .. math:: \mathrm{factor}_t = s + (1 - s) \min\Bigl(\frac{t \bmod P}{R P}, 1\Bigr)

    :param period: the number P >= 1 of steps in a cycle.
    :param proportion: the part R of a cycle in which the factor rises, in (0, 1].
    :param start: the first factor s of each cycle, in [0, 1].
    :param num_cycles: the number of cycles >= 1, after which the factor stays 1. With None, the
        cycles never end.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if an argument is out of range.

    Source: Fu, Li, Liu, Gao, Celikyilmaz and Carin (2019), Cyclical Annealing Schedule: A Simple
    Approach to Mitigating KL Vanishing.

    >>> schedule = CyclicalKL(period=4, num_cycles=2)
    >>> [schedule.factor_at(step) for step in range(10)]
    [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        period: int,
        proportion: float = 0.5,
        start: float = 0.0,
        num_cycles: int | None = 4,
    ) -> None:
        check_integer("CyclicalKL", "period", period, 1)
        check_real("CyclicalKL", "proportion", proportion, 0.0, 1.0)
        check_real("CyclicalKL", "start", start, 0.0, 1.0)
        if proportion == 0:
            raise ValueError("CyclicalKL: proportion must be positive, but it is 0.")
        if num_cycles is not None:
            check_integer("CyclicalKL", "num_cycles (unless None)", num_cycles, 1)
        self.period = period
        self.proportion = proportion
        self.start = start
        self.num_cycles = num_cycles
        super().__init__()

    def factor_at(self, step: int) -> float:
        """Return the factor at an optimiser step.

        :param step: the index of the step; 0 for the first step.
        """
        if self._is_over(step):
            return 1.0
        risen = (step % self.period) / (self.proportion * self.period)
        return self.start + (1.0 - self.start) * min(risen, 1.0)

    @property
    def finished(self) -> bool:
        """Whether the factor stays 1 from the current step on."""
        return self._is_over(self.num_steps_taken)

    def _is_over(self, step: int) -> bool:
        return self.num_cycles is not None and step >= self.num_cycles * self.period
