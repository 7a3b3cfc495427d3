"""What a graph would freeze ends in eager steps and one warning, or in an error."""

import functools
import itertools
import random
import warnings
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO
from pyro_ext.infer.svi.capture import compiled_step
from tests.infer.svi.programs import PROBLEMS, SmallVAE, images, vae

X = torch.tensor(2.0)
COUNTS = itertools.count()
FACTORS = {"scale": 1.0}


def guide(x):
    return pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.8))


def observe(z, x, scale=1.0):
    pyro.sample("x", dist.Normal(z, scale), obs=x)


def branch_on_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if z.sum() > 0 else -z, x)


def branch_on_an_item(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z if z.sum().item() > 0 else -z, x)


def number_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=float(z.detach().abs().sum()) + 1)


def list_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=z.reshape(-1).tolist()[0] ** 2 + 1)


def array_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, scale=1 + torch.from_numpy(z.detach().numpy()).square())


def shape_of_a_draw(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x + 0.0 * z[z > 0].sum())


def python_random_numbers(x):
    observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x, 1 + random.random())


def rare_python_random_numbers(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 3.0 if random.random() < 1e-9 else 1.0)


def numpy_random_numbers(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, torch.as_tensor(np.random.uniform(1, 2), dtype=torch.float32))


def numpy_generator(x, generator=np.random.default_rng(0)):  # noqa: B008
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1 + float(generator.uniform()))


def numpy_array(x, generator=np.random.default_rng(0)):  # noqa: B008
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1 + torch.from_numpy(generator.uniform(size=1)).float().squeeze())


def counter(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    observe(z, x, 1.0 + next(COUNTS))


#: name -> (model, what the warning says)
REFUSED = {
    "branch": (branch_on_a_draw, "look at the value of a tensor.*'z'"),
    "branch on an item": (branch_on_an_item, "look at the value of a tensor.*'z'"),
    "number": (number_of_a_draw, "two runs do not do the same.*'z'.*torch.tensor of"),
    "list": (list_of_a_draw, "tolist takes values out of the graph.*'z'"),
    "array": (array_of_a_draw, "numpy takes values out of the graph.*'z'"),
    "shape": (shape_of_a_draw, "index.Tensor depends on values"),
    "random": (python_random_numbers, "Python's module random"),
    "rare random": (rare_python_random_numbers, "Python's module random"),
    "numpy.random": (numpy_random_numbers, "Python's module numpy.random"),
    "generator": (numpy_generator, "the programs change 'default 0 of numpy_generator'"),
    "generator's array": (numpy_array, "the programs change 'default 0 of numpy_array'"),
    "counter": (counter, "the programs change 'COUNTS' themselves"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_programs_take_eager_steps_with_one_warning(name):
    model, message = REFUSED[name]
    optim = pyro.optim.Adam({"lr": 0.01})
    loss = ImportanceWeightedELBO(3, max_plate_nesting=0)
    svi = CompiledSVI(model, guide, optim, loss, backend="eager")
    with pytest.warns(UserWarning, match=f"takes eager steps: .*{message}") as record:
        svi.step(X)
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({svi.step(X) for _ in range(4)}) == 4
    strict = CompiledSVI(model, guide, optim, loss, backend="eager", fallback=False)
    with pytest.raises(RuntimeError, match=message):
        strict.step(X)


def test_eager_steps_are_those_of_svi():
    losses = {}
    for cls in (SVI, functools.partial(CompiledSVI, backend="eager")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = ImportanceWeightedELBO(3, max_plate_nesting=0)
        svi = cls(branch_on_a_draw, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses[cls] = [svi.step(X) for _ in range(5)]
    assert len({tuple(values) for values in losses.values()}) == 1


def still(model, guide=guide, **options):
    loss = ImportanceWeightedELBO(3, max_plate_nesting=0)
    return CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss, backend="eager", **options)


def assert_follows(svi, *args):
    state = pyro.util.get_rng_state()
    expected = svi.objective.loss(svi.model, svi.guide, *args)
    pyro.util.set_rng_state(state)
    assert svi.step(*args) == pytest.approx(expected, rel=1e-6)


def take_steps(svi, batches):
    for x in batches:
        assert_follows(svi, x)


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


def change(holder, key, value):
    holder[key] = value


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
    with pytest.warns(UserWarning, match=r"the programs change 'kept"):
        svi.step(X)


def test_refused_captures_leave_the_programs_as_they_were():
    owner = WithAttributes()
    svi = still(owner.counting_model)
    with pytest.warns(UserWarning, match="the programs change"):
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


class Doubled(Trace_ELBO):
    def loss(self, *args, **kwargs):
        return 2 * super().loss(*args, **kwargs)


class Clipped(Trace_ELBO):
    def loss_and_grads(self, *args, **kwargs):
        loss = super().loss_and_grads(*args, **kwargs)
        for _, param in pyro.get_param_store().named_parameters():
            if param.grad is not None:
                param.grad.clamp_(-0.1, 0.1)
        return loss


def test_overridden_losses_are_not_bypassed():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), Doubled(), backend="eager")
    svi.step(X)
    state = pyro.util.get_rng_state()
    expected = Trace_ELBO().loss(model, guide, X)
    pyro.util.set_rng_state(state)
    with pytest.warns(UserWarning, match="the graph does not compute what the programs do"):
        assert svi.evaluate_loss(X) == pytest.approx(2 * expected, rel=1e-6)
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.1}), Clipped(), backend="eager")
    with pytest.warns(UserWarning, match="the graph does not compute what the programs do: 'loc'"):
        svi.step(X)


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


def test_programs_that_count_are_refused():
    owner = WithAttributes()
    svi = still(owner.counting_model)
    with pytest.warns(UserWarning, match=r"the programs change 'WithAttributes.calls' themselves"):
        svi.step(X)


def test_arguments_that_are_objects_are_known_by_identity():
    class Batch:
        def __init__(self, x):
            self.x = x

    def model(batch):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), batch.x)

    svi = still(model, max_graphs=2)
    batch = Batch(X)
    assert_follows(svi, batch)
    batch.x = X + 1
    assert_follows(svi, batch)
    assert svi._graphs.count == 1
    assert_follows(svi, Batch(X + 2))
    with pytest.warns(UserWarning, match=r"max_graphs=2, and now other arguments"):
        assert_follows(svi, Batch(X + 3))


def test_shapes_that_change_at_each_step_end_in_eager_steps():
    problem = vae()
    svi = CompiledSVI(
        *problem[:2], pyro.optim.SGD({"lr": 0.0}), problem.loss, backend="eager", max_graphs=3
    )
    problem.loss.max_plate_nesting = 1
    with pytest.warns(UserWarning, match="max_graphs=3, and now other arguments") as record:
        take_steps(svi, [images(batch_size) for batch_size in range(2, 10)])
    assert len(record) == 1
    assert svi._graphs.count == 3
    assert_follows(svi, images(2))  # still has its graph


def test_late_parameters_end_in_eager_steps():
    def late_guide(x):
        guide(x)
        if "begin" in pyro.get_param_store():
            pyro.param("late", torch.tensor(0.0))

    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model, late_guide)
    for _ in range(10):
        svi.step(X)
    pyro.param("begin", torch.tensor(0.0))
    with pytest.warns(UserWarning, match="after 16 steps, parameter 'late'"):
        take_steps(svi, [X] * 10)
    assert "late" in pyro.get_param_store()


def test_hooks_on_gradients_end_in_eager_steps():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model)
    svi.step(X)
    norms = []
    pyro.param("loc").unconstrained().register_hook(lambda grad: norms.append(grad.norm().item()))
    with pytest.warns(UserWarning, match="a hook on the gradient"):
        svi.step(X)
    svi.step(X)
    assert len(norms) == 2


def test_arguments_that_require_gradients_end_in_eager_steps():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = still(model, lambda x: guide(x))
    with pytest.warns(UserWarning, match="an argument requires gradients"):
        svi.step(X.clone().requires_grad_())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (TraceGraph_ELBO(), "TraceGraph_ELBO has no differentiable_loss"),
        (ImportanceWeightedELBO(4, particle_chunk_size=2), "particle_chunk_size=2 expects"),
    ],
)
def test_objectives_without_a_differentiable_loss_take_eager_steps(loss, message):
    problem = vae(loss=loss)
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), loss, backend="eager")
    with pytest.warns(UserWarning, match=message):
        svi.step(*problem.args)
    svi.step(*problem.args)


def test_handlers_around_the_steps_are_seen():
    def model(x):
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    svi = CompiledSVI(
        model,
        guide,
        pyro.optim.SGD({"lr": 0.0}),
        Trace_ELBO(),
        backend="eager",
        fallback=False,
    )
    assert_follows(svi, X)
    with pyro.poutine.scale(scale=3.0):
        assert_follows(svi, X)
        assert_follows(svi, X)
    assert_follows(svi, X)
    assert svi._graphs.count == 2


def test_errors_of_the_programs_come_through():
    problem = PROBLEMS["VAE"]()
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), problem.loss, backend="eager")
    svi.step(*problem.args)
    with (
        pytest.warns(UserWarning, match="takes eager steps"),
        pytest.raises(RuntimeError, match="mat1 and mat2"),
    ):
        svi.step(images()[:, :5])


@pytest.mark.parametrize("fallback", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing(fallback):
    problem = vae()
    svi = CompiledSVI(
        *problem[:2],
        pyro.optim.Adam({"lr": 0.01}),
        problem.loss,
        backend="eager",
        fallback=fallback,
    )
    svi.step(*problem.args)
    before = {name: p.clone() for name, p in pyro.get_param_store().named_parameters()}
    x = images()
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match="the log-probability of site 'z' of the guide is NaN"):
        svi.step(x)
    for name, param in pyro.get_param_store().named_parameters():
        assert torch.equal(param, before[name])
    svi.step(*problem.args)


def test_without_a_compiler_graphs_run_as_they_are(monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    problem = vae()
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = CompiledSVI(*problem[:2], optim, problem.loss)
    strict = CompiledSVI(*problem[:2], optim, problem.loss, fallback=False)
    with config.patch({"cpp.cxx": ("/without/a/compiler",)}):
        with pytest.warns(UserWarning, match=r"runs graphs as they are: inductor could not"):
            svi.step(*problem.args)
        svi.step(*problem.args)
        assert svi._graphs.count == 1
        with pytest.raises(RuntimeError, match="inductor could not compile"):
            strict.step(*problem.args)


def test_a_wrong_compiler_is_found_out(monkeypatch):
    def compile_wrongly(graph, inputs, backend):
        def run(*tensors):
            loss, *gradients = graph(*tensors)
            return [loss, *(None if g is None else 1.01 * g for g in gradients)]

        return run

    monkeypatch.setattr(compiled_step, "compile_graph", compile_wrongly)
    problem = vae()
    svi = CompiledSVI(*problem[:2], pyro.optim.Adam({"lr": 0.01}), problem.loss)
    with pytest.raises(RuntimeError, match=r"does not compute what the eager one does: 'vae\$\$\$"):
        svi.step(*problem.args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "expected backend to be 'inductor' or 'eager', got 'jax'"),
        ({"mode": "fast"}, "expected mode to be one of"),
        ({"max_graphs": 0}, "max_graphs must be at least 1, but it is 0"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CompiledSVI(guide, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
