"""One optimiser for all parameters does what Pyro's one for each does."""

import copy

import pyro
import pytest
import torch
from pyro.optim import PyroOptim

from pyro_ext.infer.svi.joint_optimizer import JointOptimizer


def by_name(name):
    return {"lr": 0.1 if name == "a" else 0.01}


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.05}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.5, "lrd": 0.9}),
    "AdagradRMSProp": lambda: pyro.optim.AdagradRMSProp({}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.1}),
    "by name": lambda: pyro.optim.Adam(by_name),
    "fused": lambda: pyro.optim.Adam({"lr": 0.05, "fused": True}),
    "foreach": lambda: pyro.optim.Adam({"lr": 0.05, "foreach": True}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.5}
    ),
}


def train(make, joint, state=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = make()
    if state is not None:
        optim.set_state(state)
    for name in "abc":
        pyro.param(name, torch.randn(3))
    step = JointOptimizer(optim).step if joint else lambda params: optim(set(params))
    for number in range(12):
        params = [p for _, p in pyro.get_param_store().named_parameters()]
        for param in params[: 3 if number % 4 else 2]:
            param.grad = torch.randn(3) + param.detach()
        step(params)
        for param in params:
            param.grad = None
        if number % 3 == 2 and hasattr(optim, "step"):
            optim.step()
        if number == 7:
            for own in optim.optim_objs.values():
                group = getattr(own, "optimizer", own).param_groups[0]
                group["weight_decay"] = 0.3
    return {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}, optim


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_pyro(name):
    expected, _ = train(OPTIMIZERS[name], joint=False)
    found, optim = train(OPTIMIZERS[name], joint=True)
    for key, param in expected.items():
        torch.testing.assert_close(found[key], param, rtol=1e-5, atol=1e-6)
    state = optim.get_state()
    expected, _ = train(OPTIMIZERS[name], joint=False, state=copy.deepcopy(state))
    found, _ = train(OPTIMIZERS[name], joint=True, state=copy.deepcopy(state))
    for key, param in expected.items():
        torch.testing.assert_close(found[key], param, rtol=1e-5, atol=1e-6)


def test_all_parameters_are_stepped_at_once(monkeypatch):
    calls = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (calls.append(1), step(self)))
    train(OPTIMIZERS["Adam"], joint=True)
    assert len(calls) == 12


@pytest.mark.parametrize("names", ["abc", "b"])
def test_a_new_learning_rate_takes_effect_at_once(names):
    optim = pyro.optim.SGD({"lr": 0.0})
    joint = JointOptimizer(optim)
    params = {name: pyro.param(name, torch.zeros(1)) for name in "abc"}
    for lr in (0.0, 0.0, 1.0, 0.0, 2.0):
        for name in names:
            if params[name] in optim.optim_objs:
                optim.optim_objs[params[name]].param_groups[0]["lr"] = lr
        for param in params.values():
            param.grad = -torch.ones(1)
        joint.step([*params.values()])
    assert {name: param.item() for name, param in params.items()} == {
        name: 3.0 if name in names else 0.0 for name in "abc"
    }


def test_another_kind_of_optimizer_is_left_alone():
    class Own(PyroOptim):
        def __call__(self, params):
            for param in params:
                param.data.sub_(param.grad)

    value = pyro.param("a", torch.zeros(2))
    value.grad = torch.ones(2)
    JointOptimizer(Own(torch.optim.Adam, {})).step([value])
    assert value.tolist() == [-1.0, -1.0]


@pytest.mark.cuda
@pytest.mark.parametrize("start", ["fresh", "saved on a CPU", "foreach before"])
def test_cuda_parameters_are_stepped_by_the_fused_optimizer(start):
    def train_on(device, kinds):
        torch.manual_seed(0)
        optim = pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.1})
        joint = JointOptimizer(optim)
        pyro.clear_param_store()
        for name in "abc":
            pyro.param(name, torch.randn(3).to(device))
        params = [p for _, p in pyro.get_param_store().named_parameters()]
        for number in range(9):
            if number == 4 and start == "saved on a CPU":
                state = optim.get_state()
                for own in state.values():
                    own["state"][0]["step"] = own["state"][0]["step"].cpu()
                optim = pyro.optim.Adam({"lr": 0.05, "weight_decay": 0.1})
                optim.set_state(state)
                joint = JointOptimizer(optim)
            for param in params:
                param.grad = torch.randn(3).to(device)
            if number < 4 and start == "foreach before":
                optim(params)
            else:
                joint.step(params)
        kinds |= {group.get("fused") for group in joint._joint.param_groups}
        return [param.detach().cpu() for param in params]

    kinds = set()
    found, expected = train_on("cuda", kinds), train_on("cpu", kinds)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert kinds == {True}
