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
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    JackknifeELBO,
    KLWeightedELBO,
    MultilevelELBO,
    compile_elbo,
)
from tests.infer.svi.capture.test_audits import hidden_scale
from tests.infer.svi.normal_programs import normal_guide, normal_model
from tests.infer.svi.programs import PROBLEMS, images

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")

OBJECTIVES = {
    "pathwise": lambda: ImportanceWeightedELBO(4),
    "dreg": lambda: ImportanceWeightedELBO(4, gradient="dreg"),
    "jackknife": lambda: JackknifeELBO(4),
    "multilevel": lambda: MultilevelELBO(2, max_level=3),
    "Trace_ELBO": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
}


def mlp(*sizes):
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(*sizes[1:]))


def decode(net, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)


def encode(net, x):
    with pyro.plate("data", len(x)):
        loc, log_scale = net(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Decoder(nn.Module):
    """A model whose parameters are in no param store."""

    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, 12)

    def forward(self, x):
        decode(self.net, x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(12, 8, 6)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        encode(self.net, self.norm(x))


class PyroDecoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, 12)
        self.temperature = PyroParam(torch.tensor(1.5), constraint=dist.constraints.positive)

    def forward(self, x):
        temperature = self.temperature
        decode(lambda z: self.net(z) / temperature, x)


class PyroEncoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(12, 8, 6)
        self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        encode(self.net, x + self.shift)


def slope_model(x):
    loc = pyro.param("loc", torch.zeros(12))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + loc, scale).to_event(1), obs=x)


def slope_guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.sum(-1), 0.7))


def global_model(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


#: name -> a function that makes model and guide
PAIRS = {
    "functions": lambda: (slope_model, slope_guide),
    "nn.Module": lambda: (Decoder(), Encoder()),
    "PyroModule": lambda: (PyroDecoder(), PyroEncoder()),
    "AutoNormal": lambda: (global_model, AutoNormal(global_model)),
}


def eager(elbo):
    return elbo


def compiled(elbo, **options):
    return compile_elbo(elbo, **{"backend": "eager", "fallback": False, **options})


def params_of(module):
    """The parameters of a module, and those of the param store."""
    found = [p.unconstrained() for p in pyro.get_param_store().values()]
    return list(dict.fromkeys([*module.parameters(), *found]))


class Loop:
    """A training loop, from a seed, on one of the pairs."""

    def __init__(self, make, pair="PyroModule", elbo=None, optimizer=torch.optim.Adam, lr=0.01):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.x = images()
        self.module = make(elbo or ImportanceWeightedELBO(3))(*PAIRS[pair]())
        self.module(self.x)  # creates the parameters
        self.params = params_of(self.module)
        self.optimizer = optimizer(self.params, lr=lr)
        self.losses = []

    def step(self, loss):
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @property
    def results(self):
        return [torch.tensor(self.losses), *map(torch.Tensor.detach, self.params)]

    @property
    def gradients(self):
        return [param.grad for param in self.params]


def assert_same(run, pair="PyroModule", elbo=lambda: None, tolerance=1e-5, **options):
    """Check that a run with both modules gives the same losses and parameters."""
    results = []
    for make in (eager, compiled):
        loop = Loop(make, pair, elbo(), **options)
        run(loop)
        results.append(loop.results)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert loop.module._graphs.count >= 1
    return loop


def take(num_steps):
    def run(loop):
        for _ in range(num_steps):
            loop.step(loop.module(loop.x))

    return run


@pytest.mark.long
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pair", PAIRS)
def test_trains_like_the_module_of_pyro(pair, objective):
    assert_same(take(200), pair, OBJECTIVES[objective])


def accumulate(loop):
    for _ in range(8):
        loop.optimizer.zero_grad()
        for rows in loop.x.split(5):
            loss = loop.module(rows)
            loop.losses.append(loss.item())
            (loss / 2).backward()
        loop.optimizer.step()


def accumulate_in_place(loop):
    for _ in range(8):
        loop.optimizer.zero_grad(set_to_none=False)
        for _ in range(3):
            loop.module(loop.x).backward()
        loop.optimizer.step()


def clip(loop):
    for _ in range(8):
        loop.optimizer.zero_grad()
        loop.module(loop.x).backward()
        loop.losses.append(torch.nn.utils.clip_grad_norm_(loop.params, 0.1).item())
        torch.nn.utils.clip_grad_value_(loop.params, 0.01)
        loop.optimizer.step()


def scale(loop):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for _ in range(8):
        loop.optimizer.zero_grad()
        scaler.scale(loop.module(loop.x)).backward()
        scaler.unscale_(loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.params, 1.0)
        scaler.step(loop.optimizer)
        scaler.update()


def several_optimizers(loop):
    halves = loop.params[::2], loop.params[1::2]
    optimizers = torch.optim.SGD(halves[0], lr=1e-3), torch.optim.Adam(halves[1], lr=0.01)
    for step in range(12):
        loss = loop.module(loop.x)
        loop.module.zero_grad()
        loss.backward()
        optimizers[step % 3 // 2].step()
        loop.losses.append(loss.item())


@contextlib.contextmanager
def frozen(params):
    for param in params:
        param.requires_grad_(False)
    yield
    for param in params:
        param.requires_grad_(True)


def freeze(loop):
    take(3)(loop)
    with frozen(loop.params[::2]):
        take(4)(loop)
        assert [p for p in loop.params[::2] if p.grad is not None] == []
    take(3)(loop)
    with frozen(loop.params):
        assert not loop.module(loop.x).requires_grad


def further_terms(loop):
    for step in range(8):
        loss = 0.1 * step * loop.module(loop.x) + loop.module(loop.x[:4])
        loop.step(loss / 10 + sum(param.square().sum() for param in loop.params))


def change_loss_in_place(loop):
    for _ in range(4):
        loss = loop.module(loop.x)
        loss /= 7
        loss += 1
        loop.step(loss)


def keep_the_graph(loop):
    for _ in range(4):
        loss = loop.module(loop.x)
        loss.backward(retain_graph=True)
        loop.losses.append(loop.params[0].grad.norm().item())
        loss.backward(retain_graph=True)
        found = torch.autograd.grad(2 * loss, loop.params)
        loop.losses += [x.sum().item() for x in found]


def evaluate(loop):
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for _ in range(3):
            with mode():
                loss = loop.module(loop.x)
            assert loss.requires_grad == (mode is torch.enable_grad)
            loop.losses.append(loss.item())
        take(2)(loop)


def load(loop):
    take(3)(loop)
    state = copy.deepcopy(loop.module.state_dict())
    take(3)(loop)
    loop.module.load_state_dict(state)
    take(3)(loop)


def hooks(loop):
    handles = [loop.params[0].register_hook(lambda gradient: 3 * gradient)]
    take(4)(loop)
    handles += [loop.params[1].register_hook(lambda gradient: gradient.clamp(max=0))]
    seen = []
    handles += [loop.params[1].register_post_accumulate_grad_hook(seen.append)]
    take(4)(loop)
    assert len(seen) == 4
    for handle in handles:
        handle.remove()
    take(4)(loop)


@pytest.mark.filterwarnings("ignore:.* was not registered in the param store:UserWarning")
@pytest.mark.parametrize("pair", [*PAIRS])
@pytest.mark.parametrize(
    "run",
    [
        accumulate,
        accumulate_in_place,
        clip,
        scale,
        several_optimizers,
        freeze,
        further_terms,
        change_loss_in_place,
        keep_the_graph,
        evaluate,
        load,
        hooks,
    ],
    ids=lambda run: run.__name__,
)
def test_any_loop_gives_the_numbers_of_eager_steps(run, pair):
    assert_same(run, pair)


def autocast(loop):
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loop.module(loop.x)
        loop.step(loss)


class PreciseDecoder(Decoder):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            decode(lambda z: self.net(z.float()), x)


def test_autocast_covers_the_loss_and_not_its_gradients(monkeypatch):
    monkeypatch.setitem(PAIRS, "precise", lambda: (PreciseDecoder(), Encoder()))
    assert_same(autocast, "precise")


def test_autocast_to_float16_takes_eager_steps():
    # Small gradients in float16 need the factor of a GradScaler before they vanish.
    loop = Loop(lambda elbo: compiled(elbo, fallback=True))
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.warns(UserWarning, match="under autocast to float16, the loss must be scaled"),
    ):
        loop.module(loop.x)


def replace_parameters(loop):
    take(3)(loop)
    state = {name: 0.9 * x.detach() for name, x in loop.module.state_dict().items()}
    loop.module.load_state_dict(state, assign=True)
    loop.params[:] = params_of(loop.module)
    loop.optimizer.param_groups[0]["params"] = loop.params
    take(3)(loop)


def test_parameters_may_be_replaced():
    assert_same(replace_parameters, "nn.Module", optimizer=torch.optim.SGD, lr=1e-3)


def test_the_module_is_like_that_of_pyro():
    expected, found = (
        make(ImportanceWeightedELBO(3))(Decoder(), Encoder()) for make in (eager, compiled)
    )
    assert isinstance(found, type(expected))
    assert [*found.state_dict()] == [*expected.state_dict()]
    assert [*dict(found.named_parameters())] == [*dict(expected.named_parameters())]
    assert not found.eval().guide.norm.training


def switch_modes(loop):
    for step in range(12):
        loop.module.train(step % 4 < 2)
        loop.step(loop.module(loop.x))


def test_modes_of_modules_have_graphs_of_their_own():
    loop = assert_same(switch_modes, "nn.Module")
    assert loop.module._graphs.count == 2


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("pair", ["nn.Module", "PyroModule", "functions"])
def test_copies_train_on_their_own(pair, make_copy):
    results = []
    for make in (eager, compiled):
        loop = Loop(make, pair)
        take(4)(loop)
        before = [param.detach().clone() for param in loop.module.parameters()]
        pyro.clear_param_store()  # Pyro would tie the parameters of the copy to it
        loop.module = (copy.deepcopy if make is eager else make_copy)(loop.module)
        others, loop.params = loop.params, []
        loop.module(loop.x)
        loop.params = params_of(loop.module)
        loop.optimizer = torch.optim.Adam(loop.params, lr=0.01)
        take(4)(loop)
        results.append(loop.results)
        for old, other in zip(before, others, strict=False):
            assert torch.equal(old, other)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_copies_beside_their_original_take_its_place_in_no_gradient():
    loop = Loop(compiled, "nn.Module")
    take(3)(loop)
    other = copy.deepcopy(loop.module)
    for module in (loop.module, other, loop.module, other, other):
        for param in [*loop.module.parameters(), *other.parameters()]:
            param.grad = None
        module(loop.x).backward()
        assert all((p.grad is not None) == (module is other) for p in other.parameters())


def test_parameters_in_modules_alone():
    with pyro.settings.context(module_local_params=True):
        for pair in ("PyroModule", "AutoNormal"):
            assert_same(take(12), pair)
            assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.long
def test_programs_of_many_kinds(name):
    results = []
    for make in (eager, compiled):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        problem = PROBLEMS[name]()
        module = make(problem.loss)(problem.model, problem.guide)
        module(*problem.args)
        params = params_of(module)
        optimizer = torch.optim.Adam(params, lr=0.01)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = module(*problem.args)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if isinstance(problem.loss, KLWeightedELBO):
                problem.loss.schedule.step()
        results.append([torch.tensor(losses), *(param.detach() for param in params)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    "run", [take(20), keep_the_graph, evaluate], ids=["take", "keep", "evaluate"]
)
def test_inductor_gives_the_numbers_of_eager_steps(run):
    results = []
    for make in (eager, lambda elbo: compile_elbo(elbo, fallback=False)):
        loop = Loop(make)
        run(loop)
        results.append(loop.results)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


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
    loop = Loop(compiled)
    take(3)(loop)
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
    for _ in range(6):
        module(torch.tensor(2.0)).backward()
    module.audit()
    while (
        module._graphs.count
        and next(iter(module._graphs._by_key.values()))[0].checked_at == module._num_steps
    ):
        module(torch.tensor(2.0)).backward()
    set_scale(3.0)
    with pytest.warns(UserWarning, match="are suspect"):
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
