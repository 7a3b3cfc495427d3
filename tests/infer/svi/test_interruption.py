"""An interrupted run resumes to the last bit."""

import functools
import os
import random
import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoStructured
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.infer.svi.programs import PROBLEMS, Problem, images, regression, regression_data
from tests.infer.svi.runs import BOTH, eager, loader, make

pytestmark = pytest.mark.usefixtures("python_handles_interrupts")


def interrupt_after(num_steps):
    def callback(history):
        if len(history.losses) == num_steps:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("steps_before", [1, 4, 6])
@pytest.mark.parametrize("scheduler", [False, True])
def test_resumes_to_the_last_bit(make_svi, steps_before, scheduler, tmp_path):
    path = tmp_path / "run.pt"

    def result(svi, module):
        return (
            svi.history,
            {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()},
            {name: tensor.clone() for name, tensor in module.state_dict().items()},
            pyro.util.get_rng_state(),
            svi.objective.schedule.num_steps_taken,
        )

    svi, module = make(make_svi, scheduler)
    svi.run(loader(), 4, False)
    expected = result(svi, module)

    svi, module = make(make_svi, scheduler)

    with pytest.raises(KeyboardInterrupt):
        svi.run(loader(), 4, False, interrupt_after(steps_before), checkpoint=path)
    assert len(svi.history.losses) == steps_before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    svi, module = make(make_svi, scheduler)
    pyro.set_rng_seed(77)
    random.random()
    svi.run(loader(), 4, False, resume=path)
    history, params, state, rng, num_steps = result(svi, module)
    assert history == expected[0]
    assert params.keys() == expected[1].keys()
    assert [name for name in params if not torch.equal(params[name], expected[1][name])] == []
    assert [name for name in state if not torch.equal(state[name], expected[2][name])] == []
    assert torch.equal(rng["torch"], expected[3]["torch"])
    assert num_steps == expected[4]


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("name", ["AutoNormal", "BayesianModule", "subsampled plate, locals"])
def test_resumes_programs_that_make_their_parameters(make_svi, name, tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS[name]()
        optim = pyro.optim.Adam({"lr": 0.01})
        return make_svi(problem.model, problem.guide, optim, problem.loss), problem.args

    svi, args = fresh()
    expected = svi.run(10, 1, False, args=args).losses
    params = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    svi, args = fresh()
    with pytest.raises(KeyboardInterrupt):
        svi.run(10, 1, False, interrupt_after(6), args=args, checkpoint=tmp_path / "run")
    svi, args = fresh()
    assert svi.run(10, 1, False, args=args, resume=tmp_path / "run").losses == expected
    for name, param in pyro.get_param_store().named_parameters():
        assert torch.equal(param, params[name])


def wrapped_net(wrap):
    net = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

    def model(nets, x, y):
        pyro.module("net", nets[0])
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(nets[0](x).squeeze(-1), 1.0), obs=y)

    def guide(x, y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    return Problem(wrap(model, net), guide, Trace_ELBO(), regression_data())


WRAPPERS = {
    "partial": lambda model, net: functools.partial(model, [net]),
    "scale": lambda model, net: pyro.poutine.scale(functools.partial(model, (net,)), scale=0.5),
    "condition": lambda model, net: pyro.condition(lambda x, y: model({0: net}, x, y), {}),
}


def structured(model):
    return AutoStructured(model, conditionals="normal", dependencies="linear")


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("name", [*WRAPPERS, "AutoIAFNormal", "AutoStructured"])
@pytest.mark.filterwarnings("ignore:CompiledSVI takes eager steps")
def test_resumes_programs_of_many_kinds(make_svi, name, tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        if name in WRAPPERS:
            problem = wrapped_net(WRAPPERS[name])
        else:
            guide = {"AutoIAFNormal": AutoIAFNormal, "AutoStructured": structured}[name]
            problem = Problem(regression, guide(regression), Trace_ELBO(), regression_data())
        optim = pyro.optim.Adam({"lr": 0.01})
        return make_svi(problem.model, problem.guide, optim, problem.loss), problem.args

    svi, args = fresh()
    expected = svi.run(6, 2, False, args=args).losses
    for end in (4, 9):
        svi, args = fresh()
        resume = None if end == 4 else tmp_path / "run"
        with pytest.raises(KeyboardInterrupt):
            svi.run(
                6,
                2,
                False,
                interrupt_after(end),
                args=args,
                checkpoint=tmp_path / "run",
                resume=resume,
            )
    svi, args = fresh()
    assert svi.run(6, 2, False, args=args, resume=tmp_path / "run").losses == expected


def test_a_generator_of_the_loader_is_resumed(tmp_path):
    def data():
        generator = torch.Generator().manual_seed(5)
        dataset = TensorDataset(images(12))
        return DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)

    svi, _ = make(eager)
    expected = svi.run(data(), 3, False).losses
    svi, _ = make(eager)
    with pytest.raises(KeyboardInterrupt):
        svi.run(data(), 3, False, interrupt_after(5), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    assert svi.run(data(), 3, False, resume=tmp_path / "run").losses == expected


def test_data_without_a_length_resumes_at_the_end_of_an_epoch(tmp_path):
    class Stream:
        def __iter__(self):
            return iter([images(4)] * 3)

    svi, _ = make(eager)
    with pytest.raises(KeyboardInterrupt):
        svi.run(Stream(), 3, False, interrupt_after(3), checkpoint=tmp_path / "run")
    svi, _ = make(eager)
    assert svi.run(Stream(), 3, False, resume=tmp_path / "run").epoch_ends == [3, 6, 9]
