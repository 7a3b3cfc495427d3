"""Parameters that come late, and every optimiser, are resumed to the last bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_ext.infer import EagerSVI
from tests.infer.svi.programs import regression_data

OPTIMIZERS = {
    name: {"lr": 0.01}
    for name in [
        *(n for n in pyro.optim.pytorch_optimizers.__all__ if hasattr(torch.optim, n)),
        "AdagradRMSProp",
        "ClippedAdam",
        "DCTAdam",
    ]
} | {"AdagradRMSProp": {"eta": 0.1}, "SGD": {"lr": 0.01, "momentum": 0.9}}
del OPTIMIZERS["SparseAdam"]  # it takes sparse gradients only


def observe(x, y, loc):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def with_param():
    def model(x, y, is_late):
        loc = x @ pyro.param("weights", torch.zeros(3))
        if is_late:
            loc = loc + pyro.param(
                "late", torch.tensor(0.5), constraint=dist.constraints.interval(0.0, 1.0)
            )
        observe(x, y, loc)

    return model


def with_module():
    net, late = nn.Linear(3, 1), nn.Linear(3, 1)

    def model(x, y, is_late):
        pyro.module("net", net)
        loc = net(x)
        if is_late:
            pyro.module("late", late)
            loc = loc * late(x)
        observe(x, y, loc.squeeze(-1))

    return model


class Late(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 1)
        self.late = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x, y, is_late):
        loc = self.net(x).squeeze(-1)
        observe(x, y, loc * self.late if is_late else loc)


def matrices():
    def model(x, y, is_late):
        weights = pyro.param("weights", torch.full((3, 2), 0.1))
        observe(x, y, (x @ weights).prod(-1))

    return model


def fresh(program, optim):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return EagerSVI(program(), lambda *args: None, optim, Trace_ELBO())


def stepwise():
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}
    return pyro.optim.ExponentialLR(arguments)


def batches():
    return [(*regression_data(), is_late) for is_late in (False, True, False, True, True)]


def result(svi):
    store = pyro.get_param_store()
    return svi.history.losses, {name: x.detach().clone() for name, x in store.items()}


def check_resumed(program, make_optim, tmp_path, num_steps):
    svi = fresh(program, make_optim())
    svi.run(batches(), 3, False)
    losses, params = result(svi)
    svi = fresh(program, make_optim())
    stop = lambda history: len(history.losses) == num_steps  # noqa: E731
    svi.run(batches(), 3, False, stop, checkpoint=tmp_path / "run")
    svi = fresh(program, make_optim())
    svi.run(batches(), 3, False, resume=tmp_path / "run")
    again, again_params = result(svi)
    assert again == losses
    assert again_params.keys() == params.keys()
    assert [name for name in params if not torch.equal(params[name], again_params[name])] == []


@pytest.mark.long
@pytest.mark.parametrize("program", [with_param, with_module, Late])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 7])
def test_a_late_parameter_is_resumed(program, num_steps, tmp_path):
    check_resumed(program, lambda: pyro.optim.Adam({"lr": 0.05}), tmp_path, num_steps)
    check_resumed(program, stepwise, tmp_path, num_steps)


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_is_resumed(name, tmp_path):
    program = matrices if name == "Muon" else Late  # which takes matrices only
    check_resumed(program, lambda: getattr(pyro.optim, name)(OPTIMIZERS[name]), tmp_path, 7)
