"""Objects of any kind may be looked at: nothing that they raise reaches the user."""

import collections
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.utils.data import TensorDataset

from pyro_ext.infer import CompiledSVI, EagerSVI
from tests.infer.svi.capture.programs import X, guide, observe


class Raises:
    """Raises an error for whatever is asked of it."""

    def _raise(self, *args):
        raise RuntimeError("do not touch")

    __eq__ = __len__ = __iter__ = __bool__ = __repr__ = __getitem__ = __contains__ = _raise
    __hash__ = None

    def __getattr__(self, name):
        raise RuntimeError("do not touch")


class Meta(type):
    def __len__(cls):
        raise RuntimeError("do not touch")

    def __eq__(cls, other):
        raise RuntimeError("do not touch")

    __hash__ = type.__hash__


class OfMeta(metaclass=Meta):
    pass


class WithoutDict:
    @property
    def __dict__(self):
        raise RuntimeError("do not touch")


class OddList(list):
    def __init__(self, *args):
        super().__init__(*args)

    def copy(self):
        raise RuntimeError("do not touch")

    def __eq__(self, other):
        raise RuntimeError("do not touch")

    __hash__ = None


class OddDict(dict):
    def __iter__(self):
        raise RuntimeError("do not touch")


ARRAY = np.empty(2, dtype=object)
ARRAY[0] = Raises()

OBJECTS = {
    "OrderedDict": collections.OrderedDict,
    "class of namedtuple": collections.namedtuple("Point", "x y"),
    "nn.Sequential": nn.Sequential,
    "dataset class": TensorDataset,
    "dataset": TensorDataset(torch.ones(3)),
    "data frame": pd.DataFrame({"a": [1.0, np.nan], "b": ["x", "y"]}),
    "series": pd.Series([1.0, 2.0]),
    "xarray": xr.Dataset({"a": ("x", [1.0, 2.0])}),
    "raises": Raises(),
    "list that holds it": [Raises(), Raises()],
    "dict that holds it": {"a": Raises()},
    "tuple that holds it": (Raises(),),
    "metaclass": OfMeta,
    "instance of it": OfMeta(),
    "without a dict": WithoutDict(),
    "odd list": OddList([1, 2]),
    "odd dict": OddDict(a=1),
    "array of objects": ARRAY,
    "array of NaN": np.array([np.nan, 1.0]),
    "array of names": np.array(["a", "b"]),
    "NaN": (float("nan"), [float("nan")], {"a": complex("nan")}),
    "itself": [],
    "frozen set": frozenset({(1, 2.5), "a"}),
}
OBJECTS["itself"].append(OBJECTS["itself"])


def losses_of(cls, subject, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x, 1.0 if subject is not None else 2.0)

    svi = cls(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
    return [svi.step(X) for _ in range(4)], svi


@pytest.mark.parametrize("name", OBJECTS)
def test_any_object_may_be_named(name, tmp_path):
    expected, _ = losses_of(SVI, OBJECTS[name])
    found, svi = losses_of(CompiledSVI, OBJECTS[name], backend="eager", fallback=False)
    assert found == pytest.approx(expected, rel=1e-6)
    assert svi._graphs.count == 1
    _, svi = losses_of(EagerSVI, OBJECTS[name])
    svi.run(2, 1, False, args=(X,), checkpoint=tmp_path / "run")
    svi.run(2, 2, False, args=(X,), resume=tmp_path / "run")


def test_too_many_values_are_refused_by_the_name_of_their_container():
    table = [torch.tensor(float(i)) for i in range(20_001)]

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, table[3])

    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="eager")
    with pytest.warns(UserWarning, match=r"more than 20000 values .* last one is 'table\[\d+\]'"):
        svi.step(X)


def lstm_problem():
    net = nn.LSTM(1, 8, batch_first=True)

    def model(x, y):
        pyro.module("net", net)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[0][..., -1, 0] + a, 1.0), obs=y)

    def lstm_guide(x, y):
        pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return model, lstm_guide, (torch.randn(30, 10, 1), torch.randn(30))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_graph_that_fails_leaves_all_as_it_was(backend):
    results = []
    for cls in (SVI, lambda *args: CompiledSVI(*args, backend=backend)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, lstm_guide, args = lstm_problem()
        svi = cls(model, lstm_guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            losses = [svi.step(*args) for _ in range(4)]
        params = [p.detach().clone() for _, p in sorted(pyro.get_param_store().named_parameters())]
        results.append((losses, params, pyro.util.get_rng_state()["torch"], len(record)))
    (losses, params, state, _), (found, found_params, found_state, num_warnings) = results
    assert found == pytest.approx(losses, rel=1e-5)
    for x, y in zip(params, found_params, strict=True):
        torch.testing.assert_close(x, y)
    assert torch.equal(state, found_state)
    assert num_warnings <= 1
