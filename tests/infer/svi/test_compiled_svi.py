"""CompiledSVI takes the steps of SVI, from the same random numbers."""

import copy
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, KLWeightedELBO, estimate_evidence
from tests.infer.svi.capture.programs import guide
from tests.infer.svi.normal_programs import normal_guide, normal_model, still
from tests.infer.svi.programs import PROBLEMS, Problem, SmallVAE, images, vae
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean

pytestmark = pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")


def train(cls, make, num_steps=12, **options):
    """Losses, parameters and buffers after some steps from a seed."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    problem = make()
    optim = pyro.optim.Adam({"lr": 0.02})
    svi = cls(problem.model, problem.guide, optim, problem.loss, **options)
    losses = []
    for _ in range(num_steps):
        losses.append(svi.step(*problem.args))
        if isinstance(problem.loss, KLWeightedELBO):
            problem.loss.schedule.step()
    losses.append(svi.evaluate_loss(*problem.args))
    owner = getattr(problem.model, "__self__", nn.Module())
    params = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    return svi, losses, params, dict(owner.named_buffers())


def assert_same_training(make, **options):
    _, expected, params, buffers = train(SVI, make)
    svi, losses, found, found_buffers = train(CompiledSVI, make, fallback=False, **options)
    assert all(type(loss) is float for loss in losses)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert found.keys() == params.keys()
    for name, param in params.items():
        torch.testing.assert_close(found[name], param, rtol=1e-4, atol=1e-5)
    for name, buffer in buffers.items():
        torch.testing.assert_close(found_buffers[name], buffer)
    assert svi._graphs.count == 2  # a step, and an evaluation


@pytest.mark.long
@pytest.mark.parametrize("name", PROBLEMS)
def test_takes_the_steps_of_svi(name):
    assert_same_training(PROBLEMS[name], backend="eager")


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize(
    "gradient", ["pathwise", "dreg", pytest.param("stl", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_takes_the_steps_of_svi_with_every_estimator(name, gradient):
    make, _ = ESTIMATORS[name]
    assert_same_training(lambda: vae(loss=make(4, gradient=gradient)), backend="eager")


@pytest.mark.long
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="older compilers refuse Bernoulli draws of the eager generator: graphs run as they are",
)
@pytest.mark.parametrize(
    "name",
    [
        name if name == "KL warm-up" else pytest.param(name, marks=pytest.mark.slow)
        for name in PROBLEMS
    ],
)
def test_inductor_takes_the_steps_of_svi(name):
    assert_same_training(PROBLEMS[name])


def test_gradients_are_those_of_the_eager_step_on_the_same_noise():
    problem = vae(loss=ImportanceWeightedELBO(20))
    svi = CompiledSVI(*problem[:2], pyro.optim.SGD({"lr": 0.0}), problem.loss, backend="eager")
    svi.step(*problem.args)
    params = dict(pyro.get_param_store().named_parameters())
    pyro.set_rng_seed(3)
    problem.loss.loss_and_grads(*problem[:2], *problem.args)
    expected = {name: param.grad.clone() for name, param in params.items()}
    for param in params.values():
        param.grad = None
    found = {}
    svi._optimizer.step = lambda params, _: found.update({p: p.grad.clone() for p in params})
    pyro.set_rng_seed(3)
    svi.step(*problem.args)
    for name, param in params.items():
        torch.testing.assert_close(found[param], expected[name], rtol=1e-5, atol=1e-5)


def linear_model():
    weight = pyro.param("weight", torch.ones(3))
    matrix = pyro.param("matrix", torch.ones(2, 3))
    total = weight.sum() + (matrix.t() * torch.arange(6.0).reshape(3, 2)).sum()
    pyro.factor("linear", -total)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_are_laid_out_like_parameters(backend):
    # Those of sums and transposes are not, and fused optimisers read them as if they were.
    results = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": backend, "fallback": False})):
        pyro.clear_param_store()
        svi = cls(linear_model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        for _ in range(5):
            svi.step()
        results.append([pyro.param(name).detach() for name in ("weight", "matrix")])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_tied_parameters_are_stepped_once():
    results = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        linear = nn.Linear(1, 1, bias=False)
        linear.weight.data.fill_(1.0)

        def model(linear=linear):
            pyro.module("a", linear)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pyro.module("b", linear)
            pyro.factor("weight", -linear.weight.sum())

        svi = cls(model, lambda: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(), **options)
        for _ in range(4):
            svi.step()
        results.append(linear.weight.item())
    assert results[1] == pytest.approx(results[0])


def test_parameters_without_a_gradient_are_stepped_as_by_svi():
    x = torch.ones(3)
    losses = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        heads = nn.ModuleList([nn.Linear(1, 3), nn.Linear(1, 3)])

        def model(head, heads=heads):
            pyro.module("heads", heads)
            loc = heads[head](torch.ones(1))
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

        svi = cls(model, lambda head: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        losses.append([svi.step(step % 3 // 2) for step in range(12)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_parameters_that_come_later_begin_as_in_svi():
    values = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"backend": "eager", "fallback": False})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

        def model(name):
            weight = pyro.param(f"weight_{name}", lambda: torch.randn(3))
            pyro.sample("x", dist.Normal(weight, 1.0).to_event(1), obs=torch.ones(3))

        svi = cls(model, lambda name: None, pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), **options)
        for name in ("a", "b", "c", "b", "c"):
            svi.step(name)
        values.append([pyro.param(f"weight_{name}").detach() for name in "abc"])
    torch.testing.assert_close(values[0], values[1])


def test_no_step_is_taken_where_gradients_are_off():
    svi = CompiledSVI(
        normal_model,
        normal_guide,
        pyro.optim.SGD({"lr": 0.1}),
        ImportanceWeightedELBO(3),
        backend="eager",
    )
    svi.step(torch.tensor(2.0))
    before = pyro.param("loc").item()
    with torch.no_grad():
        svi.step(torch.tensor(2.0))
    assert pyro.param("loc").item() == before


def test_random_numbers_follow_the_seed_and_are_fresh():
    problem = vae()
    svi = CompiledSVI(*problem[:2], pyro.optim.SGD({"lr": 0.0}), problem.loss, backend="eager")
    svi.step(*problem.args)
    pyro.set_rng_seed(5)
    first = [svi.step(*problem.args) for _ in range(4)]
    pyro.set_rng_seed(5)
    second = [svi.step(*problem.args) for _ in range(4)]
    assert first == second
    assert len(set(first)) == 4


@pytest.mark.long
def test_capture_leaves_random_states_and_buffers_as_they_were():
    pyro.set_rng_seed(2)
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.5))
    problem = Problem(module.model, module.guide, ImportanceWeightedELBO(3), (images(),))
    reference = copy.deepcopy(module)
    svi = SVI(reference.model, reference.guide, pyro.optim.Adam({"lr": 0.01}), problem.loss)
    state = pyro.util.get_rng_state()
    svi.step(*problem.args)
    expected = pyro.util.get_rng_state()
    pyro.clear_param_store()
    pyro.util.set_rng_state(state)
    CompiledSVI(
        *problem[:2], pyro.optim.Adam({"lr": 0.01}), ImportanceWeightedELBO(3), backend="eager"
    ).step(*problem.args)
    found = pyro.util.get_rng_state()
    assert torch.equal(found["torch"], expected["torch"])
    assert found["random"] == expected["random"]
    assert (found["numpy"][1] == expected["numpy"][1]).all()
    assert found["numpy"][2:] == expected["numpy"][2:]
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)


def test_a_loss_function_of_ones_own():
    def loss(model, guide, x):
        return ImportanceWeightedELBO(3).differentiable_loss(model, guide, x)

    svi = still(normal_model, normal_guide, loss)
    pyro.set_rng_seed(1)
    svi.step(torch.tensor(2.0))
    pyro.set_rng_seed(1)
    expected = loss(normal_model, normal_guide, torch.tensor(2.0)).item()
    pyro.set_rng_seed(1)
    assert svi.step(torch.tensor(2.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:estimate_evidence. Pareto k")
def test_reaches_the_evidence_of_eager_steps_on_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    x = torch.as_tensor(datasets.load_digits().data, dtype=torch.float32)
    x = (x > 7).float()
    train, held_out = x[:1000], x[1000:1200]
    totals = {SVI: [], CompiledSVI: []}
    for run in range(5):
        for cls, found in totals.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            module = SmallVAE(num_pixels=64)
            loss = ImportanceWeightedELBO(5, max_plate_nesting=1)
            options = {"backend": "eager", "fallback": False} if cls is CompiledSVI else {}
            svi = cls(module.model, module.guide, pyro.optim.Adam({"lr": 0.01}), loss, **options)
            pyro.set_rng_seed(2 * run + (cls is CompiledSVI))  # other noise for each
            for step in range(200):
                svi.step(train[100 * (step % 10) : 100 * (step % 10 + 1)])
            evidence = estimate_evidence(module.model, module.guide, held_out, num_samples=500)
            found.append(evidence.log_evidence.mean())
    eager, compiled = (torch.stack(found) for found in totals.values())
    assert_mean(eager - compiled, 0.0, num_errors=3)
    assert eager.mean() > -40


def test_pickles_and_copies_without_its_graphs():
    svi = still(normal_model, normal_guide, ImportanceWeightedELBO(3))
    svi.step(torch.tensor(2.0))
    for other in (pickle.loads(pickle.dumps(svi)), copy.deepcopy(svi)):
        assert other._graphs.count == 0
        pyro.set_rng_seed(1)
        expected = svi.step(torch.tensor(2.0))
        pyro.set_rng_seed(1)
        assert other.step(torch.tensor(2.0)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "jax"}, "backend must be 'inductor' or 'eager', but it is 'jax'"),
        ({"mode": "fast"}, "mode must be one of 'default', .* but it is 'fast'"),
        ({"max_graphs": 0}, "max_graphs must be at least 1, but it is 0"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CompiledSVI(guide, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
