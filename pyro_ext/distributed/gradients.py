"""Weighted means of losses and gradients over processes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from pyro_ext.distributed.packing import Gradients, Place, buckets, packed, unpacked
from pyro_ext.distributed.processes import Processes


@dataclass(frozen=True)
class Contribution:
    """The numbers that a process adds to those of the others, beside gradients.

    :ivar weight: the weight of the process, such as its number of rows.
    :ivar losses: its losses; at most two.
    :ivar has_failed: whether its step has raised an error.
    :ivar is_interrupted: whether it has received a signal to end.
    :ivar has_ended: whether it has no more data in this epoch.
    :ivar has_new: whether it uses parameters, or has gradients, that are new.
    :ivar has_several: whether its rows belong to several divided plates.
    :ivar is_late: whether a gradient has changed after it was sent.
    """

    weight: float = 0.0
    losses: tuple[float, ...] = ()
    has_failed: bool = False
    is_interrupted: bool = False
    has_ended: bool = False
    has_new: bool = False
    has_several: bool = False
    is_late: bool = False

    @property
    def numbers(self) -> list[float]:
        """The numbers, in the order in which :class:`Total` has their sums."""
        first, second = (self.weight * x if self.weight else 0.0 for x in (*self.losses, 0, 0)[:2])
        flags = [self.has_failed, self.is_interrupted, self.has_ended, self.has_new]
        flags += [self.has_several, self.is_late]
        return [self.weight, first, second, *map(float, flags)]


class Total(NamedTuple):
    """The sums over processes, with the means of losses and gradients.

    :ivar weight: the sum of the weights.
    :ivar first_loss: the weighted mean of the first losses.
    :ivar second_loss: the weighted mean of the second losses.
    :ivar num_failed: the number of processes whose step has raised an error.
    :ivar num_interrupted: the number of processes with a signal to end.
    :ivar num_ended: the number of processes without data.
    :ivar num_with_new: the number of processes with new parameters or gradients.
    :ivar num_with_several: the number of processes with rows of several divided plates.
    :ivar num_late: the number of processes in which a gradient has changed after it was sent.
    :ivar gradients: the weighted mean of the gradients by name; None where no process has one.
    """

    weight: float
    first_loss: float
    second_loss: float
    num_failed: int
    num_interrupted: int
    num_ended: int
    num_with_new: int
    num_with_several: int
    num_late: int
    gradients: dict[str, Tensor | None]


_NUM_NUMBERS = len(Contribution().numbers)


@dataclass
class GradientExchange:
    """An exchange of gradients in vectors of limited size.

    All processes agree on the parameters. If a step has gradients of further parameters in one
    process, they are exchanged after the others, and the processes agree on them from then on.

    :ivar processes: the processes.
    :ivar bucket_bytes: the number of bytes at which a vector is full.
    :ivar places: the parameters that the processes agree on, by name.
    :ivar num_overlapped: the number of vectors of the last step that were sent before the end of
        the backward pass.
    """

    processes: Processes
    bucket_bytes: float = math.inf
    places: dict[str, Place] = field(default_factory=dict)
    num_overlapped: int = 0
    _buckets: list[dict[str, Place]] = field(default_factory=lambda: [{}])
    _started: list[tuple[Tensor, Callable[[], None]]] = field(default_factory=list)
    _expected: Counter[str] = field(default_factory=Counter)
    _is_late: bool = False

    def add(self, mine: Contribution, gradients: Gradients) -> Total:
        """Return the sums over processes, and the weighted means of gradients.

        :param mine: the numbers of this process.
        :param gradients: its gradients by name.
        :raises ValueError: if a parameter does not have the same shape in all processes.
        """
        new = {
            name: Place.of(x)
            for name, x in gradients.items()
            if x is not None and name not in self.places
        }
        mine = replace(mine, has_new=mine.has_new or bool(new), is_late=self._is_late)
        total = self._add(mine, gradients, self._buckets)
        if total.num_failed:
            return total
        if total.num_late:
            total = self._add(mine, gradients, self._buckets)
        if total.num_with_new:
            late = self._agreed(new)
            more = self._add(mine, gradients, [*buckets(late, math.inf)])
            if not self.places:  # these losses have the dtype of those of later steps
                total = total._replace(first_loss=more.first_loss, second_loss=more.second_loss)
            self.places |= late
            self._buckets = [*buckets(self.places, self.bucket_bytes)]
            total = total._replace(gradients=total.gradients | more.gradients)
        return total

    @contextmanager
    def overlapped(
        self, params: Mapping[str, Tensor], weight: Callable[[], float]
    ) -> Iterator[None]:
        """Send vectors of gradients during the backward passes of a block.

        A vector is sent when its gradients have been added to as often as in the last step.

        :param params: the parameters by name.
        :param weight: a function that returns the weight of this process.
        """
        counts: Counter[str] = Counter()
        place_of = {name: i for i, bucket in enumerate(self._buckets[:-1]) for name in bucket}

        def after(name: str) -> None:
            counts[name] += 1
            self._is_late |= place_of.get(name, math.inf) < len(self._started)
            for bucket in self._buckets[len(self._started) : -1]:
                if not all(0 < self._expected[x] <= counts[x] for x in bucket):
                    break
                self._start(bucket, weight(), {x: params[x].grad for x in bucket})

        self._is_late = False
        with ExitStack() as stack:
            for name in filter(lambda name: params[name].requires_grad, place_of):
                hook = params[name].register_post_accumulate_grad_hook(lambda _, x=name: after(x))
                stack.callback(hook.remove)
            yield
        self.num_overlapped = len(self._started)
        self._expected = counts

    def _start(self, bucket: Mapping[str, Place], weight: float, gradients: Gradients) -> None:
        vector = packed([], weight, gradients, bucket)
        self._started.append(self.processes.start_to_add(vector))

    def _add(
        self, mine: Contribution, gradients: Gradients, parts: list[dict[str, Place]]
    ) -> Total:
        for bucket in parts[len(self._started) : -1]:
            self._start(bucket, mine.weight, gradients)
        names = [name for bucket in parts for name in bucket]
        has_gradient = [float(gradients.get(name) is not None) for name in names]
        numbers = [*mine.numbers, *has_gradient]
        last = self.processes.add(packed(numbers, mine.weight, gradients, parts[-1]))
        header, vectors = last[: len(numbers)].tolist(), []
        for vector, wait in self._started:
            wait()
            vectors.append(vector)
        self._started, self._is_late = [], False
        weight, first, second, *flags = header[:_NUM_NUMBERS]
        found: dict[str, Tensor] = {}
        for vector, bucket in zip([*vectors, last[len(numbers) :]], parts, strict=True):
            found |= unpacked(vector.div_(weight or 1.0), gradients, bucket)
        counts = dict(zip(names, header[_NUM_NUMBERS:], strict=True))
        means = {name: found[name] if counts[name] else None for name in names}
        losses = first / (weight or 1.0), second / (weight or 1.0)
        return Total._make([weight, *losses, *map(round, flags), means])

    def _agreed(self, new: dict[str, Place]) -> dict[str, Place]:
        """Return the new parameters of all processes, in the order of the first ones."""
        found: dict[str, Place] = {}
        for rank, places in enumerate(self.processes.gather(new)):
            for name, place in places.items():
                if found.setdefault(name, place) != place:
                    first = found[name]
                    raise ValueError(
                        f"The parameter '{name}' has shape {place.shape} and {place.dtype} on rank "
                        f"{rank}, but shape {first.shape} and {first.dtype} on another rank. Make "
                        "the same model and guide in each process."
                    )
        return found
