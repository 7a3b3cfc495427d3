"""Places of numbers that no name leads to, so that only an audit can show an edit."""

import contextvars
import os
import threading
import weakref
from collections import ChainMap
from types import MappingProxyType

import numpy as np

from tests.infer.svi.fuzzing.places import of


def environment():
    key = f"FUZZED_{threading.get_ident()}_{np.random.randint(1 << 30)}"
    os.environ[key] = "1.0"
    return lambda: float(os.environ[key]), lambda new: os.environ.update({key: str(new)})


def weak():
    class Owner:
        value = 1.0

    owner = Owner()
    link = weakref.ref(owner)

    def edit(new, owner=owner):
        owner.value = new

    return lambda: link().value, edit


def context_variable():
    variable = contextvars.ContextVar("value", default=1.0)
    return lambda: variable.get(), lambda new: variable.set(new)


def thread_local():
    holder = threading.local()
    holder.value = 1.0
    return lambda: holder.value, lambda new: setattr(holder, "value", new)


def read_only_view():
    values = {"value": 1.0}
    view = MappingProxyType(values)
    return lambda: view["value"], lambda new: values.update(value=new)


HIDDEN = {
    "environment": environment,
    "weak reference": weak,
    "context variable": context_variable,
    "thread-local": thread_local,
    "read-only view": read_only_view,
    "ChainMap": of(lambda: ChainMap({1: 1.0})),
}
