import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType


@contextmanager
def postponed_interrupts() -> Iterator[list[int]]:
    """Postpone the first interrupt (Ctrl-C), and raise a second one at once.

    The first interrupt is appended to the list that the context manager yields. Only the main
    thread can postpone interrupts. In other threads, the list stays empty.
    """
    interrupts: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    usual = signal.getsignal(signal.SIGINT)
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread() and callable(usual):
            stack.callback(signal.signal, signal.SIGINT, usual)
            signal.signal(signal.SIGINT, keep)
        yield interrupts
