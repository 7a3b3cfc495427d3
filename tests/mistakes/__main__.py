"""Print the message of each mistake."""

import pyro

from tests.mistakes import MISTAKES, message_of

for name, (call, kind, _) in MISTAKES.items():
    pyro.clear_param_store()
    try:
        call()
    except kind as error:
        print(f"## {name}\n{type(error).__name__}: {message_of(error)}\n")
