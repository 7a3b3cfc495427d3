"""The time of a part."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """The time that is left until a deadline.

    :param float deadline: a time of ``time.perf_counter``.
    :param bool is_rehearsal: whether the sizes are those for a machine without a GPU.
    """

    def __init__(self, deadline: float, is_rehearsal: bool) -> None:
        self.deadline = deadline
        self.is_rehearsal = is_rehearsal
        self.start = time.perf_counter()
        self._longest = 0.0

    @property
    def left(self) -> float:
        """The seconds until the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def passed(self) -> float:
        """The seconds since the start of the part."""
        return time.perf_counter() - self.start

    def select(self, items: Iterable[T], left_out: list[T]) -> Iterator[T]:
        """Yields items while the longest so far still fits; the others are appended to a list."""
        for item in items:
            if self.left < self._longest:
                left_out.append(item)
                continue
            start = time.perf_counter()
            yield item
            self._longest = max(self._longest, time.perf_counter() - start)
