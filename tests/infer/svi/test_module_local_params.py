"""Checkpoints hold the parameters that Pyro keeps in modules."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_ext.infer import EagerSVI
from tests.infer.svi.programs import regression_data


@pytest.fixture(autouse=True)
def local_params():
    with pyro.settings.context(module_local_params=True):
        yield


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        # Under this setting, Pyro's own SVI accepts no other parameters than PyroParams.
        self.weights = PyroParam(torch.randn(3))
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, x, y):
        scale = self.scale * pyro.sample("z", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.norm(x) @ self.weights, scale), obs=y)


def make(scheduler=False):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Regression()
    optim = pyro.optim.Adam({"lr": 0.05})
    if scheduler:
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
        )
    return EagerSVI(model, AutoNormal(model), optim, Trace_ELBO())


def tensors(svi):
    return {
        **svi.model.state_dict(),
        **{f"guide.{k}": x for k, x in svi.guide.state_dict().items()},
    }


@pytest.mark.parametrize("scheduler", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_run(scheduler, tmp_path):
    svi = make(scheduler)
    svi.run(4, 3, False, args=regression_data())
    expected = svi.history, tensors(svi)
    assert len(pyro.get_param_store()) == 0
    svi = make(scheduler)
    stop = lambda history: len(history.losses) == 6  # noqa: E731
    svi.run(4, 3, False, stop, args=regression_data(), checkpoint=tmp_path / "run")
    svi = make(scheduler)
    svi.run(4, 3, False, args=regression_data(), resume=tmp_path / "run")
    assert svi.history == expected[0]
    found = tensors(svi)
    assert found.keys() == expected[1].keys()
    assert [name for name in found if not torch.equal(found[name], expected[1][name])] == []


def test_a_run_under_the_other_setting_is_refused(tmp_path):
    svi = make()
    svi.run(4, 1, False, args=regression_data())
    svi.save(tmp_path / "run")
    with pyro.settings.context(module_local_params=False):
        svi = make()
        with pytest.raises(ValueError, match="'module_local_params' of Pyro is False, but it was"):
            svi.load(tmp_path / "run", *regression_data())
        assert len(pyro.get_param_store()) == 0


def test_a_parameter_that_cannot_be_found_is_refused(tmp_path):
    svi = make()
    svi.step(*regression_data())
    stray = torch.zeros(7, requires_grad=True)
    stray.grad = torch.zeros(7)
    svi.optim([stray])
    with pytest.raises(
        ValueError, match=r"a parameter of shape \(7,\) is in a module that neither"
    ):
        svi.save(tmp_path / "run")
