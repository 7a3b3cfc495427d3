import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any


class NestedInterrupt(KeyboardInterrupt):
    """An interrupt inside of a call that postpones it further, such as in the callback of a run."""


class Interrupts:
    """The signals that arrived inside of :func:`postponed_interrupts`. It is true if there is one.

    :param usual: a dict from the number of each postponed signal to what the user does about it.
    """

    def __init__(self, usual: dict[int, Any]) -> None:
        self._usual = usual
        self._process = os.getpid()
        self._waiting: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def keep(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: keep the first one, and deliver a second one at once."""
        # A forked child has this handler, too. It must end when it is terminated, as in a pool.
        is_of_child = number != signal.SIGINT and os.getpid() != self._process
        if self._waiting or is_of_child:
            self._deliver(number)
        else:
            self._waiting.append(number)

    def deliver(self) -> None:
        """Do what the signal asks for, if there is one. Call this at a safe point.

        An interrupt raises ``KeyboardInterrupt``. Any other signal is raised again, as if it had
        not been postponed. If the user's own handler returns, this method returns as well.
        """
        if self._waiting:
            self._deliver(self._waiting.pop())

    def drop_interrupt(self) -> None:
        """Forget an interrupt, because an exception that ends the program is on its way."""
        self._waiting = [number for number in self._waiting if number != signal.SIGINT]

    def raise_rest(self) -> None:
        """Raise the signal that no safe point has delivered, once the handlers are the user's."""
        if self._waiting:
            signal.raise_signal(self._waiting.pop())

    def _deliver(self, number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, self._usual[number])
        try:
            signal.raise_signal(number)
        finally:
            signal.signal(number, self.keep)


class _NestedInterrupts(Interrupts):
    """The signals that an outer :func:`postponed_interrupts` keeps. It delivers them once more.

    :param outer: the signals of the outer block.
    """

    def __init__(self, outer: Interrupts) -> None:
        super().__init__({})
        self._outer = outer
        self._is_delivered = False

    def __bool__(self) -> bool:
        return bool(self._outer) and not self._is_delivered

    def deliver(self) -> None:
        if self:
            self._is_delivered = True
            raise NestedInterrupt


@contextmanager
def postponed_interrupts(*signals: int) -> Iterator[Interrupts]:
    """Postpone the first interrupt (Ctrl-C) to a safe point, and raise a second one at once.

    Call :meth:`Interrupts.deliver` of the yielded value at each safe point. A signal that is not
    delivered inside of the block is raised after it. Enter this context before all others, so that
    it is left after them. Only the main thread can postpone signals.

    Inside of another such block, the inner one ends first, and the outer one then does what the
    signal asks for.

    :param signals: the signals to postpone; SIGINT alone by default.
    """
    is_main = threading.current_thread() is threading.main_thread()
    for either in (signal.SIGINT, signal.SIGTERM):
        outer = getattr(signal.getsignal(either), "__self__", None)
        if is_main and isinstance(outer, Interrupts):
            yield _NestedInterrupts(outer)
            return
    usual: dict[int, Any] = {}
    if is_main:
        for number in signals or (signal.SIGINT,):
            handler = signal.getsignal(number)
            # With the default SIGINT, the user wants no KeyboardInterrupt. None comes from C.
            is_default = handler is signal.SIG_DFL and number != signal.SIGINT
            if callable(handler) or is_default:
                usual[number] = handler
    interrupts = Interrupts(usual)
    try:
        with ExitStack() as stack:
            for number, handler in usual.items():
                stack.callback(signal.signal, number, handler)
                signal.signal(number, interrupts.keep)
            yield interrupts
    except Exception:
        raise
    except BaseException:
        interrupts.drop_interrupt()
        raise
    finally:
        interrupts.raise_rest()
