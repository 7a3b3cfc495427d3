"""Places where a program may keep a number, each with a function that reads and one that edits it.

The number is a positive float, and a tensor in some places.
"""

import contextlib
import functools
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

Pair = namedtuple("Pair", "scale other")


def closure():
    value = 1.0

    def read():
        return value

    def edit(new):
        nonlocal value
        value = new

    return read, edit


def attribute():
    owner = SimpleNamespace(value=1.0)
    return lambda: owner.value, lambda new: setattr(owner, "value", new)


def nested_attribute():
    owner = SimpleNamespace(a=SimpleNamespace(b=[SimpleNamespace(value=1.0)]))
    return lambda: owner.a.b[0].value, lambda new: setattr(owner.a.b[0], "value", new)


def of(make):
    """A place in a container whose key 1 holds the number."""

    def place():
        holder = make()

        def read():
            return holder[1]

        def edit(new):
            holder[1] = new

        return read, edit

    return place


def of_tensors(make):
    """A place in a container whose key 1 holds the number as a tensor."""

    def place():
        holder = make()

        def read():
            return holder[1]

        def edit(new):
            holder[1] = torch.tensor(new)

        return read, edit

    return place


def array():
    values = np.ones(3)

    def edit(new):
        values[1] = new

    return lambda: float(values[1]), edit


def replaced_array():
    owner = SimpleNamespace(values=np.ones(3))
    return (
        lambda: torch.from_numpy(owner.values)[1].float(),
        lambda new: setattr(owner, "values", np.full(3, new)),
    )


def tensor_in_place():
    value = torch.tensor(1.0)
    return lambda: value, lambda new: value.fill_(new)


def replaced_tensor():
    owner = SimpleNamespace(value=torch.tensor(1.0))
    return lambda: owner.value, lambda new: setattr(owner, "value", torch.tensor(new))


def length():
    owner = SimpleNamespace(rows=torch.zeros(10))
    return (
        lambda: len(owner.rows) / 10,
        lambda new: setattr(owner, "rows", torch.zeros(max(1, round(10 * new)))),
    )


def shape():
    owner = SimpleNamespace(rows=torch.zeros(2, 10))
    return (
        lambda: owner.rows.shape[1] / 10,
        lambda new: setattr(owner, "rows", torch.zeros(2, max(1, round(10 * new)))),
    )


def default():
    def read(value=1.0):
        return value

    return read, lambda new: setattr(read, "__defaults__", (new,))


def keyword_only_default():
    def read(*, value=1.0):
        return value

    return read, lambda new: read.__kwdefaults__.update(value=new)


def function_attribute():
    def read():
        return read.value

    read.value = 1.0
    return read, lambda new: setattr(read, "value", new)


def code():
    scope = {}

    def edit(new):
        exec(f"def other():\n    return {new}", scope)
        read.__code__ = scope["other"].__code__

    def read():
        return 1.0

    return read, edit


def decorated(decorator):
    def place():
        inner, edit = closure()
        return decorator(inner), edit

    return place


def repeat(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def in_context():
    inner, edit = closure()

    @contextlib.contextmanager
    def scale():
        yield inner()

    def read():
        with scale() as value:
            return value

    return read, edit


def method():
    class Owner:
        def value(self):
            return 1.0

    owner = Owner()
    return lambda: owner.value(), lambda new: setattr(Owner, "value", lambda self: new)


def static_method():
    class Owner:
        @staticmethod
        def value():
            return 1.0

    return lambda: Owner.value(), lambda new: setattr(Owner, "value", staticmethod(lambda: new))


def special_method():
    class Owner:
        def __getitem__(self, key):
            return 1.0

        def __call__(self):
            return self[0]

    owner = Owner()
    return lambda: owner(), lambda new: setattr(Owner, "__getitem__", lambda self, key: new)


def special_method_of_state():
    class Owner:
        def __init__(self):
            self.hidden = 1.0

        def __float__(self):
            return self.hidden

        def __add__(self, other):
            return self.hidden + other

    owner = Owner()
    return lambda: owner + 0.0, lambda new: setattr(owner, "hidden", new)


def class_attribute():
    class Base:
        value = 1.0

    class Owner(Base):
        pass

    owner = Owner()
    return lambda: owner.value, lambda new: setattr(Owner, "value", new)


def prop():
    class Owner:
        hidden = 1.0

        @property
        def value(self):
            return self.hidden

    owner = Owner()
    return lambda: owner.value, lambda new: setattr(Owner, "value", property(lambda self: new))


def slots():
    class Owner:
        __slots__ = ("value",)

    owner = Owner()
    owner.value = 1.0
    return lambda: owner.value, lambda new: setattr(owner, "value", new)


def frozen():
    @dataclass(frozen=True)
    class Config:
        value: float = 1.0

    owner = SimpleNamespace(config=Config())
    return lambda: owner.config.value, lambda new: setattr(owner, "config", Config(new))


def partial():
    owner = SimpleNamespace(function=functools.partial(lambda a, b: a * b, 1.0, b=1.0))
    return (
        lambda: owner.function(),
        lambda new: setattr(owner, "function", functools.partial(lambda a, b: a * b, new, b=1.0)),
    )


def subset():
    flags = {1.0}
    return lambda: sum(flags), lambda new: flags.add(new)


def named_tuple():
    owner = SimpleNamespace(pair=Pair(1.0, OrderedDict))
    return lambda: owner.pair.scale, lambda new: setattr(owner, "pair", Pair(new, Pair))


def instead_of_nan():
    owner = SimpleNamespace(missing=float("nan"), value=1.0)

    def read():
        return owner.value if owner.missing != owner.missing else 0.5

    return read, lambda new: setattr(owner, "value", new)


def of_module(change):
    """A place in a linear layer with a weight of 1."""

    def place():
        net = nn.Linear(1, 1, bias=False).requires_grad_(False)
        net.weight.fill_(1.0)
        net.register_buffer("factor", torch.tensor(1.0))
        return lambda: net(torch.ones(1))[0] * net.factor, lambda new: change(net, new)

    return place


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def new_parameter(net, new):
    if not parametrize.is_parametrized(net):
        net.weight = nn.Parameter(torch.full((1, 1), new), requires_grad=False)


def new_submodule():
    nets = nn.ModuleList([Times(1.0)])

    def edit(new):
        nets[0] = Times(new)

    return lambda: nets[0](torch.tensor(1.0)), edit


PLACES = {
    "closure": closure,
    "attribute": attribute,
    "nested attribute": nested_attribute,
    "list": of(lambda: [1.0, 1.0]),
    "long list": of(lambda: [1.0] * 500),
    "dict": of(lambda: {0: 1.0, 1: 1.0}),
    "OrderedDict": of(lambda: OrderedDict({1: 1.0})),
    "defaultdict": of(lambda: defaultdict(float, {1: 1.0})),
    "UserDict": of(lambda: UserDict({1: 1.0})),
    "deque": of(lambda: deque([1.0, 1.0])),
    "list of tensors": of_tensors(lambda: [torch.tensor(1.0), torch.tensor(1.0)]),
    "list of the same tensor": of_tensors(lambda: [torch.tensor(1.0)] * 150),
    "long list of tensors": of_tensors(lambda: [torch.tensor(1.0) for _ in range(300)]),
    "dict of tensors": of_tensors(lambda: {1: torch.tensor(1.0)}),
    "array": array,
    "replaced array": replaced_array,
    "tensor in place": tensor_in_place,
    "replaced tensor": replaced_tensor,
    "length": length,
    "shape": shape,
    "default": default,
    "keyword-only default": keyword_only_default,
    "function attribute": function_attribute,
    "code": code,
    "wraps": decorated(repeat),
    "no_grad": decorated(lambda f: torch.no_grad()(f)),
    "wraps and no_grad": decorated(lambda f: repeat(torch.no_grad()(repeat(f)))),
    "contextmanager": in_context,
    "method": method,
    "static method": static_method,
    "special method": special_method,
    "special method of state": special_method_of_state,
    "class attribute": class_attribute,
    "property": prop,
    "slots": slots,
    "frozen dataclass": frozen,
    "partial": partial,
    "set": subset,
    "namedtuple": named_tuple,
    "NaN": instead_of_nan,
    "parameter in place": of_module(lambda net, new: net.weight.fill_(new)),
    "replaced parameter": of_module(new_parameter),
    "parametrisation": of_module(
        lambda net, new: parametrize.register_parametrization(net, "weight", Times(new))
    ),
    "forward hook": of_module(
        lambda net, new: net.register_forward_hook(lambda module, args, out: new * out)
    ),
    "pre-hook": of_module(
        lambda net, new: net.register_forward_pre_hook(lambda module, args: (new * args[0],))
    ),
    "buffer": of_module(lambda net, new: net.register_buffer("factor", torch.tensor(new))),
    "submodule": new_submodule,
}
