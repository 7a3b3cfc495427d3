from collections.abc import Callable
from typing import Any

#: A call, its exception, and a regular expression for the message.
Mistake = tuple[Callable[[], Any], type[Exception], str]


def message_of(error: BaseException) -> str:
    """Return the message of an error with its notes, as a traceback shows them."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])
