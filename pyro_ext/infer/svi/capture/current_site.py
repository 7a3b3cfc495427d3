"""The current site of a run, for messages."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

from pyro_ext.infer.svi.capture.recorder import CaptureError


class CurrentSite(Messenger):
    """An effect handler that records the last sample site of a run."""

    name: str | None = None

    def _pyro_sample(self, msg: Message) -> None:
        self.name = msg["name"]

    @property
    def place(self) -> str:
        """The current place in the program, in words."""
        return "before the first site" if self.name is None else f"at or after site '{self.name}'"

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Turn an error into a :class:`CaptureError` that names the place in the program."""
        try:
            yield
        except Exception as error:
            raise CaptureError(f"{reason_of(error)}, {self.place}") from error


def reason_of(error: Exception) -> str:
    """Return the reason why a step cannot be captured, in one line."""
    if isinstance(error, CaptureError):
        return str(error)
    line = str(error).partition("\n")[0].rstrip(".")
    return f"the step raises {type(error).__name__} ({line})"
