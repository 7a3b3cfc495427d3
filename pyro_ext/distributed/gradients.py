"""Weighted means of losses and gradients over processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ext.distributed.processes import Processes

Gradients = Mapping[str, Tensor | None]


class Place(NamedTuple):
    """The place of the gradient of a parameter in the exchanged numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Contribution:
    """The numbers that a process adds to those of the others, beside gradients.

    :ivar weight: the weight of the process, such as its number of rows.
    :ivar losses: its losses; at most two.
    :ivar has_failed: whether its step has raised an error.
    :ivar is_interrupted: whether it has received a signal to end.
    :ivar has_ended: whether it has no more data in this epoch.
    """

    weight: float = 0.0
    losses: tuple[float, ...] = ()
    has_failed: bool = False
    is_interrupted: bool = False
    has_ended: bool = False

    def numbers(self, num_new: int) -> list[float]:
        """Return the numbers to be added."""
        first, second = (*self.losses, 0.0, 0.0)[:2]
        weight = self.weight
        weighted = [weight * x if weight else 0.0 for x in (first, second)]
        flags = self.has_failed, self.is_interrupted, self.has_ended, num_new > 0
        return [weight, weight * weight, *weighted, *map(float, flags)]


class Total(NamedTuple):
    """The sums over processes, with the means of losses and gradients.

    :ivar weight: the sum of the weights.
    :ivar squares: the sum of their squares.
    :ivar losses: the weighted means of the losses.
    :ivar num_failed: the number of processes whose step has raised an error.
    :ivar num_interrupted: the number of processes with a signal to end.
    :ivar num_ended: the number of processes without data.
    :ivar has_new: the number of processes whose step has gradients of parameters that had none.
    :ivar gradients: the weighted mean of the gradients by name; None where no process has one.
    """

    weight: float
    squares: float
    losses: tuple[float, float]
    num_failed: int
    num_interrupted: int
    num_ended: int
    has_new: int
    gradients: dict[str, Tensor | None]


_NUM_NUMBERS = len(Contribution().numbers(0))


@dataclass
class GradientExchange:
    """An exchange of gradients, in one operation for all parameters of a dtype.

    All processes agree on the parameters. If a step has gradients of further parameters in one
    process, a second operation exchanges these.

    :ivar processes: the processes.
    :ivar places: the parameters that the processes agree on, by name.
    """

    processes: Processes
    places: dict[str, Place] = field(default_factory=dict)

    def add(self, mine: Contribution, gradients: Gradients) -> Total:
        """Return the sums over processes, and the weighted means of gradients.

        :param mine: the numbers of this process.
        :param gradients: its gradients by name.
        :raises ValueError: if a parameter does not have the same shape in all processes.
        """
        new = {
            name: Place(tuple(x.shape), x.dtype)
            for name, x in gradients.items()
            if x is not None and name not in self.places
        }
        total = self._add(mine, gradients, self.places, len(new))
        if not total.has_new or total.num_failed:
            return total
        late: dict[str, Place] = {}
        for rank, places in enumerate(self.processes.gather(new)):
            for name, place in places.items():
                if late.setdefault(name, place) != place:
                    first = late[name]
                    raise ValueError(
                        f"The parameter '{name}' has shape {place.shape} and {place.dtype} on rank "
                        f"{rank}, but shape {first.shape} and {first.dtype} on another rank. Make "
                        "the same model and guide in each process."
                    )
        late = dict(sorted(late.items()))
        more = self._add(replace(mine, losses=()), gradients, late, 0)
        self.places.update(late)
        return total._replace(gradients=total.gradients | more.gradients)

    def _add(
        self, mine: Contribution, gradients: Gradients, places: Mapping[str, Place], num_new: int
    ) -> Total:
        numbers = mine.numbers(num_new)
        has_gradient = [float(gradients.get(name) is not None) for name in places]
        found: dict[str, Tensor | None] = {}
        header: Sequence[float] = ()
        for dtype, of_dtype in _by_dtype(places):
            first = [*numbers, *has_gradient] if not header else []
            x = self.processes.add(_packed(first, mine.weight, gradients, of_dtype, dtype))
            if first:
                header = x[: len(first)].tolist()
            rows = x[len(first) :].div_(header[0] or 1.0)
            found |= _unpacked(rows, gradients, of_dtype)
        counts = dict(zip(places, header[_NUM_NUMBERS:], strict=True))
        weight, squares, *losses = header[:4]
        failed, interrupted, ended, new = map(round, header[4:_NUM_NUMBERS])
        return Total(
            weight=weight,
            squares=squares,
            losses=(losses[0] / (weight or 1.0), losses[1] / (weight or 1.0)),
            num_failed=failed,
            num_interrupted=interrupted,
            num_ended=ended,
            has_new=new,
            gradients={name: found[name] if counts[name] else None for name in places},
        )


def _by_dtype(
    places: Mapping[str, Place],
) -> Iterable[tuple[torch.dtype, dict[str, Place]]]:
    """Group parameters by the dtype in which their gradients are added, with float32 first."""
    wide = {name: place for name, place in places.items() if place.dtype == torch.float64}
    yield torch.float32, {name: place for name, place in places.items() if name not in wide}
    if wide:
        yield torch.float64, wide


def _packed(
    numbers: Sequence[float],
    weight: float,
    gradients: Gradients,
    places: Mapping[str, Place],
    dtype: torch.dtype,
) -> Tensor:
    """Return numbers and weighted gradients as one vector, with zeros for those that are None."""
    known: list[Any] = [gradients.get(name) for name in places]
    device = next((x.device for x in known if x is not None), None)
    parts = [torch.tensor(numbers, dtype=dtype, device=device)] if numbers else []
    for x, place in zip(known, places.values(), strict=True):
        if x is None or not weight:
            parts.append(torch.zeros(torch.Size(place.shape).numel(), dtype=dtype, device=device))
        else:
            parts.append(x.reshape(-1).to(dtype))
    packed = torch.cat(parts)
    if weight:
        packed[len(numbers) :] *= weight
    return packed


def _unpacked(
    x: Tensor, gradients: Gradients, places: Mapping[str, Place]
) -> dict[str, Tensor | None]:
    sizes = [torch.Size(place.shape).numel() for place in places.values()]
    found: dict[str, Tensor | None] = {}
    for part, (name, place) in zip(x.split(sizes), places.items(), strict=True):
        mean, like = part.view(place.shape).to(place.dtype), gradients.get(name)
        # Fused optimisers assume that a gradient has the strides of its parameter.
        if like is not None and like.stride() != mean.stride():
            mean = torch.empty_like(like).copy_(mean)
        found[name] = mean
    return found
