"""Values are found wherever programs can reach them by names."""

import functools
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.infer.svi.capture.programs import X, assert_follows, observe, still

SETTINGS = SimpleNamespace(scale=1.0)
MODULE = ModuleType("settings_of_a_project")
MODULE.SCALE = 1.0
LIST_OF_OBJECTS = [SimpleNamespace(scale=1.0)]


class Config:
    scale = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


@dataclass(frozen=True)
class Frozen:
    scale: float = 1.0


class Callable_:
    """A model that is an object, with its numbers behind methods and properties."""

    def __init__(self):
        self.slotted = Slotted(1.0)
        self.frozen = Frozen()
        self.nested = SimpleNamespace(a=SimpleNamespace(b=SimpleNamespace(scale=1.0)))
        self.flags = {"plain"}
        self.number = np.float32(1.0)
        self.array = np.ones(3)
        self.prior = dist.Normal(0.0, 1.0)
        self.function = torch.square
        self.tensors = [torch.tensor(1.0)]

    @property
    def scale(self):
        return SETTINGS.scale

    def helper(self):
        return MODULE.SCALE + Config.scale + LIST_OF_OBJECTS[0].scale + self.scale

    def __call__(self, x):
        z = pyro.sample("z", self.prior)
        scale = self.helper() + self.slotted.scale + self.frozen.scale + self.nested.a.b.scale
        scale = scale + float(self.number) + float(self.array[0]) + getattr(self, "extra", 0.0)
        scale = scale + ("anneal" in self.flags) + self.tensors[0]
        observe(z, x, scale + self.function(torch.tensor(2.0)))


def set_entry(holder, key, value):
    holder[key] = value


@pytest.mark.long
@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: pyro.poutine.scale(model, 0.5)]
)
@pytest.mark.parametrize(
    "edit",
    [
        lambda model: setattr(SETTINGS, "scale", SETTINGS.scale + 1.0),
        lambda model: setattr(MODULE, "SCALE", MODULE.SCALE + 1.0),
        lambda model: setattr(Config, "scale", Config.scale + 1.0),
        lambda model: setattr(LIST_OF_OBJECTS[0], "scale", LIST_OF_OBJECTS[0].scale + 1.0),
        lambda model: setattr(model.slotted, "scale", 2.0),
        lambda model: setattr(model, "frozen", Frozen(3.0)),
        lambda model: setattr(model.nested.a.b, "scale", 4.0),
        lambda model: model.flags.add("anneal"),
        lambda model: setattr(model, "number", np.float32(5.0)),
        lambda model: set_entry(model.array, 0, 6.0),
        lambda model: setattr(model, "prior", dist.Normal(3.0, 1.0)),
        lambda model: setattr(model, "function", torch.exp),
        lambda model: set_entry(model.tensors, 0, torch.tensor(7.0)),
        lambda model: setattr(model, "extra", 8.0),
    ],
)
def test_values_are_found_wherever_they_are(edit, wrap):
    model = Callable_()
    svi = still(wrap(model), fallback=False)
    svi.step(X)
    assert_follows(svi, X)
    assert svi._graphs.count == 1
    edit(model)
    assert_follows(svi, X)
    assert_follows(svi, X)


@pytest.mark.long
def test_names_of_attributes_are_no_globals():
    scope = {"observe": observe, "pyro": pyro, "dist": dist}
    code = (
        "def model(x):\n    z = pyro.sample('z', dist.Normal(0.0, 1.0))\n    observe(z, x.mean())"
    )
    exec(code, scope)
    svi = still(scope["model"], fallback=False)
    for step in range(4):
        scope["mean"] = step
        svi.step(X)
    assert svi._graphs.count == 1
    scope["observe"] = lambda z, x: observe(z, x, 2.0)
    assert_follows(svi, X)


def test_closures_are_followed():
    scale, tensor = 1.0, torch.tensor(1.0)

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, scale + tensor)

    svi = still(functools.partial(model), fallback=False)
    svi.step(X)
    scale = 2.0
    assert_follows(svi, X)
    tensor = torch.tensor(3.0)
    assert_follows(svi, X)
    assert svi._graphs.count == 2
