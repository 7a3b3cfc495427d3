"""Other values get another graph, and programs that change values themselves are refused."""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from tests.infer.svi.capture.programs import X, assert_follows, guide, observe, still
from tests.infer.svi.programs import SmallVAE, images

FACTORS = {"scale": 1.0}


class WithAttributes:
    def __init__(self):
        self.scale = 1.0
        self.scales = [1.0, 2.0]
        self.tensor = torch.tensor(1.0)
        self.options = {"scale": 1.0}
        self.network = nn.Dropout(0.5)
        self.calls = 0

    def model(self, x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = self.scale + self.scales[1] + self.options["scale"] + FACTORS["scale"]
        observe(z, x, scale + self.tensor + self.network(torch.ones(())))

    def counting_model(self, x):
        self.calls += 1
        self.model(x)


def change(holder, key, value):
    holder[key] = value


def test_other_arrays_get_another_graph():
    owner = WithAttributes()
    owner.array = np.array(1.0)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x, torch.from_numpy(owner.array).float())

    svi = still(model, fallback=False)
    svi.step(X)
    owner.array = np.array(3.0)
    assert_follows(svi, X)
    assert svi._graphs.count == 2


@pytest.mark.long
@pytest.mark.parametrize(
    "edit",
    [
        lambda owner: setattr(owner, "scale", 5.0),
        lambda owner: change(owner.scales, 1, 7.0),
        lambda owner: change(owner.options, "scale", 9.0),
        lambda owner: change(FACTORS, "scale", FACTORS["scale"] + 1.0),
        lambda owner: owner.network.eval(),
        lambda owner: setattr(owner.network, "p", 0.9),
    ],
    ids=["attribute", "list", "dict", "global", "eval", "attribute of a module"],
)
def test_other_plain_values_get_another_graph(edit):
    owner = WithAttributes()
    svi = still(owner.model, fallback=False)
    svi.step(X)
    assert_follows(svi, X)
    assert svi._graphs.count == 1
    edit(owner)
    assert_follows(svi, X)
    assert_follows(svi, X)
    assert svi._graphs.count == 2


def test_other_tensors_need_no_other_graph():
    owner = WithAttributes()
    svi = still(owner.model, fallback=False)
    svi.step(X)
    owner.tensor = torch.tensor(6.0)
    assert_follows(svi, X)
    owner.tensor.fill_(8.0)
    assert_follows(svi, X)
    assert svi._graphs.count == 1
    owner.tensor = torch.tensor([8.0]).squeeze().double()
    assert_follows(svi, X)
    assert svi._graphs.count == 2


def test_training_mode_has_a_graph_each():
    module = SmallVAE(nn.Dropout(0.5))
    svi = CompiledSVI(
        module.model,
        module.guide,
        pyro.optim.SGD({"lr": 0.0}),
        ImportanceWeightedELBO(3, max_plate_nesting=1),
        backend="eager",
    )
    for is_training in (True, False, True, False):
        module.train(is_training)
        assert_follows(svi, images())
    assert svi._graphs.count == 2


@pytest.mark.long
def test_programs_and_optimisers_may_be_replaced():
    def first(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    def second(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 3.0)

    svi = still(first, fallback=False)
    svi.step(X)
    assert_follows(svi, X)
    svi.model = second
    assert_follows(svi, X)
    before = pyro.param("loc").item()
    assert_follows(svi, X)
    assert pyro.param("loc").item() == before
    svi.optim = pyro.optim.SGD({"lr": 0.1})
    assert_follows(svi, X)
    assert pyro.param("loc").item() != before


def test_programs_that_keep_tensors_are_refused():
    kept = {}

    def model(x):
        z = kept["z"] = pyro.sample("z", dist.Normal(0.0, 1.0))
        observe(z, x)

    kept["z"] = torch.tensor(0.0)
    svi = still(model)
    with pytest.warns(UserWarning, match=r"the model or guide changes 'kept"):
        svi.step(X)


def test_programs_that_count_are_refused():
    owner = WithAttributes()
    svi = still(owner.counting_model, num_particles=1)
    with pytest.warns(UserWarning, match=r"the model or guide changes 'WithAttributes.calls' when"):
        svi.step(X)


def test_refused_captures_leave_the_programs_as_they_were():
    owner = WithAttributes()
    svi = still(owner.counting_model, num_particles=1)
    with pytest.warns(UserWarning, match="the model or guide changes"):
        svi.step(X)
    assert owner.calls == 1
    svi.step(X)
    assert owner.calls == 2


def test_generators_of_numpy_are_not_advanced():
    draws = []
    for cls in (SVI, functools.partial(CompiledSVI, backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        generator = np.random.default_rng(0)

        def model(x, generator=generator):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            observe(z, x, 1 + float(generator.uniform()))

        loss = ImportanceWeightedELBO(3, max_plate_nesting=0)
        svi = cls(model, guide, pyro.optim.SGD({"lr": 0.1}), loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws.append([svi.step(X) for _ in range(4)])
    assert draws[0] == draws[1]
