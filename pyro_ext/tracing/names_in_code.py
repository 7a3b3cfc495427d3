"""What code and classes say about the values that they use."""

import dis
import sys
from functools import lru_cache
from types import CodeType
from typing import NamedTuple

#: Packages whose code is not searched for values of the user.
LIBRARIES = {"numpy", "pyro", "torch", "pyro_ext", "tqdm", *sys.stdlib_module_names} - {"__main__"}


class Names(NamedTuple):
    """The names in code.

    :ivar loaded_globals: the globals that it loads.
    :ivar loaded_attributes: the attributes that it loads. A string may be the name of an attribute,
        too, as in ``getattr``.
    :ivar stored: the globals and attributes that it sets.
    """

    loaded_globals: frozenset[str]
    loaded_attributes: frozenset[str]
    stored: frozenset[str]


@lru_cache(maxsize=10_000)
def names_in(code: CodeType) -> Names:
    """Return the names of globals and of attributes in code, also in nested code."""
    global_names: set[str] = set()
    attribute_names: set[str] = set()
    stored: set[str] = set()
    codes = [code]
    for part in codes:  # the loop also visits the codes that it appends
        codes += [constant for constant in part.co_consts if isinstance(constant, CodeType)]
        attribute_names |= {x for x in part.co_consts if isinstance(x, str) and x.isidentifier()}
        for instruction in dis.get_instructions(part):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                global_names.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attribute_names.add(instruction.argval)
            elif instruction.opname in ("STORE_ATTR", "STORE_GLOBAL"):
                stored.add(instruction.argval)
    return Names(frozenset(global_names), frozenset(attribute_names), frozenset(stored))


def slots_of(cls: type) -> tuple[str, ...]:
    """Return the public slots that a class defines."""
    slots = vars(cls).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))
