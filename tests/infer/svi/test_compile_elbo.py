"""A module of compile_elbo trains like Pyro's module, in any training loop."""

import contextlib
import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultilevelELBO,
    compile_elbo,
)
from pyro_ext.infer.svi.capture.front import Front
from tests.infer.svi.capture.test_audits import hidden_scale
from tests.infer.svi.normal_programs import normal_guide, normal_model
from tests.infer.svi.own_loops import (
    PAIRS,
    Decoder,
    Encoder,
    Loop,
    assert_same,
    compiled,
    eager,
    problem,
)
from tests.infer.svi.programs import PROBLEMS, images

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")

OBJECTIVES = {
    "pathwise": lambda: ImportanceWeightedELBO(4),
    "dreg": lambda: ImportanceWeightedELBO(4, gradient="dreg"),
    "jackknife": lambda: JackknifeELBO(4),
    "multilevel": lambda: MultilevelELBO(2, max_level=3),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
}


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pair", PAIRS)
def test_trains_like_the_module_of_pyro(pair, objective):
    assert_same(lambda loop: loop.take(60), problem(pair, OBJECTIVES[objective]))


@pytest.mark.long
@pytest.mark.parametrize("name", PROBLEMS)
def test_trains_programs_of_many_kinds(name):
    assert_same(lambda loop: loop.take(12), PROBLEMS[name])


def keep_the_graph(loop):
    for _ in range(3):
        loss = loop.module(loop.x)
        loss.backward(retain_graph=True)
        loop.step(loss + loop.module(loop.x))


@pytest.mark.long
def test_inductor_gives_the_numbers_of_eager_steps():
    make = lambda elbo: compile_elbo(elbo, fallback=False)  # noqa: E731
    assert_same(keep_the_graph, problem("nn.Module"), make)


def replace_parameters(loop):
    loop.take(3)
    state = {name: 0.9 * x.detach() for name, x in loop.module.state_dict().items()}
    loop.module.load_state_dict(state, assign=True)
    loop.start(loop.module)
    loop.take(3)


def switch_modes(loop):
    for step in range(12):
        loop.module.train(step % 4 < 2)
        loop.take(1)


@pytest.mark.parametrize("run", [replace_parameters, switch_modes], ids=lambda run: run.__name__)
def test_other_parameters_and_modes_have_graphs_of_their_own(run):
    assert assert_same(run, problem("nn.Module")).module._graphs.count == 2


def test_the_module_is_like_that_of_pyro():
    elbo = ImportanceWeightedELBO(3)
    expected, found = (make(elbo)(Decoder(), Encoder()) for make in (eager, compiled))
    assert isinstance(found, type(expected))
    assert [*found.state_dict()] == [*expected.state_dict()]
    assert [*dict(found.named_parameters())] == [*dict(expected.named_parameters())]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("pair", ["nn.Module", "PyroModule", "functions"])
def test_copies_train_on_their_own(pair, make_copy):
    def run(loop):
        loop.take(4)
        module, before = loop.module, copy.deepcopy(loop.module.state_dict())
        pyro.clear_param_store()  # Pyro would tie the parameters of the copy to it
        loop.start((make_copy if isinstance(module, Front) else copy.deepcopy)(module))
        loop.take(4)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name])

    assert_same(run, problem(pair))


def test_gradients_go_to_the_copy_that_was_called():
    loop = Loop(compiled, problem("nn.Module"))
    loop.take(3)
    other = copy.deepcopy(loop.module)
    for module in (loop.module, other, loop.module, other, other):
        for each in (loop.module, other):
            each.zero_grad()
        module(loop.x).backward()
        for each in (loop.module, other):
            assert all((p.grad is not None) == (each is module) for p in each.parameters())


@pytest.mark.parametrize("pair", ["PyroModule", "AutoNormal"])
def test_parameters_in_modules_alone(pair):
    with pyro.settings.context(module_local_params=True):
        assert_same(lambda loop: loop.take(12), problem(pair))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_share_no_memory(backend):
    weight = nn.Parameter(torch.ones(3))
    bias = nn.Parameter(torch.ones(3))
    constant = torch.arange(3.0)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = weight, bias

        def forward(self, x):
            total = (self.weight * x).sum() + self.bias.dot(constant) + self.bias.sum()
            pyro.factor("total", -total)

    x = torch.arange(3.0)
    module = compile_elbo(Trace_ELBO(), backend, fallback=False)(Linear(), lambda x: None)
    for _ in range(4):
        loss = module(x)
        loss.backward(retain_graph=True)
        weight.grad.mul_(7)
        bias.grad.mul_(7)
        weight.grad = bias.grad = None
        loss.backward()
        torch.testing.assert_close(weight.grad, torch.arange(3.0))
        torch.testing.assert_close(bias.grad, torch.arange(3.0) + 1)
        weight.grad.mul_(7)
        bias.grad.mul_(7)
        weight.grad = bias.grad = None
    assert torch.equal(x, torch.arange(3.0))
    assert torch.equal(constant, torch.arange(3.0))


def test_second_derivatives_are_refused():
    loop = Loop(compiled, problem("PyroModule"))
    loop.take(3)
    gradients = torch.autograd.grad(loop.module(loop.x), loop.params, create_graph=True)
    penalty = sum(gradient.square().sum() for gradient in gradients)
    with pytest.raises(NotImplementedError, match=r"has no second derivatives\. For these, call"):
        penalty.backward()
    with pytest.raises(NotImplementedError, match="has no second derivatives"):
        torch.autograd.grad(gradients[0].sum(), loop.params[-1])


def test_a_failed_audit_leaves_the_loss_of_the_programs():
    results = []
    for make in (eager, lambda elbo: compiled(elbo, audit_every=1, fallback=True)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, set_scale = hidden_scale()
        module = make(ImportanceWeightedELBO(3))(model, normal_guide)
        losses = []
        for step in range(8):
            if step == 5:
                set_scale(3.0)
            warns = step == 5 and make is not eager
            match = "compile_elbo takes eager steps: an audit at step 6 .* after step 5 are suspect"
            with pytest.warns(UserWarning, match=match) if warns else contextlib.nullcontext():
                loss = module(torch.tensor(2.0))
            loss.backward()
            losses.append(loss.item())
        results.append([*losses, pyro.param("loc").unconstrained().grad.item()])
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def test_an_audit_on_request():
    model, set_scale = hidden_scale()
    module = compiled(Trace_ELBO(), fallback=True)(model, normal_guide)
    for _ in range(40):
        module(torch.tensor(2.0)).backward()
    set_scale(3.0)
    with pytest.warns(UserWarning, match="an audit at step 40 .* are suspect"):
        module.audit()


def unreachable_parameter():
    weight = torch.ones(3, requires_grad=True)
    return lambda x: pyro.factor("weight", -(weight * x).sum()), torch.ones(3)


def branch_on_a_draw():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z if z > 0 else 2 * z, 1.0), obs=x)

    return model, torch.tensor(2.0)


def argument_with_gradients():
    return normal_model, torch.tensor(2.0, requires_grad=True)


REFUSED = {
    "requires gradients, but is not in the param store": unreachable_parameter,
    "uses the value of a tensor in Python code": branch_on_a_draw,
    "an argument requires gradients": argument_with_gradients,
}


def call_twice(module, x):
    for _ in range(2):
        module(x).backward()


@pytest.mark.parametrize("reason", REFUSED)
def test_steps_without_a_graph_are_eager_with_one_warning(reason):
    model, x = REFUSED[reason]()
    guide = normal_guide if reason != next(iter(REFUSED)) else lambda x: None
    module = compiled(Trace_ELBO(), fallback=True)(model, guide)
    with pytest.warns(UserWarning, match=f"compile_elbo takes eager steps: .*{reason}"):
        call_twice(module, x)
    module(x).backward()
    strict = compiled(Trace_ELBO())(model, guide)
    strict(x)
    with pytest.raises(RuntimeError, match=f"compile_elbo cannot compile this step: .*{reason}"):
        strict(x)


def outcome(loss, *args):
    pyro.set_rng_seed(0)
    try:
        return str(loss(*args))
    except (ValueError, UserWarning) as error:
        return str(error)


@pytest.mark.parametrize("make", [ImportanceWeightedELBO, Trace_ELBO])
def test_losses_that_are_not_finite_are_those_of_the_programs(make):
    module = compiled(make(3))(normal_model, normal_guide)
    for _ in range(5):
        module(torch.tensor(2.0)).backward()
    for x in (torch.tensor(math.inf), torch.tensor(math.nan)):
        assert outcome(module, x) == outcome(module.elbo(normal_model, normal_guide), x)


def test_first_losses_may_be_added():
    results = []
    for make in (eager, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        module = make(ImportanceWeightedELBO(3))(Decoder(), Encoder())
        (module(images()) + module(images())).backward()
        results.append([param.grad for param in module.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


WRONG = {
    "elbo is the class Trace_ELBO. Pass an instance of it": lambda: compile_elbo(Trace_ELBO),
    "elbo must be an ELBO, but it is a function. Pass": lambda: compile_elbo(normal_model),
    "TraceGraph_ELBO has no differentiable_loss. Pass": lambda: compile_elbo(TraceGraph_ELBO()),
    "max_graphs must be an integer": lambda: compile_elbo(Trace_ELBO(), max_graphs=2.0),
    "the guide is the class AutoNormal. Pass an instance": lambda: compile_elbo(Trace_ELBO())(
        normal_model, AutoNormal
    ),
    "the model is a tensor": lambda: compile_elbo(Trace_ELBO())(torch.ones(2), normal_guide),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_types_are_refused(message):
    with pytest.raises(TypeError, match=f"compile_elbo: .*{message}"):
        WRONG[message]()
