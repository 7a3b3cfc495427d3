"""The estimators behave as Pyro's own: the ways to a loss, particles, copies."""

import copy
import math
import pickle
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO
from tests.infer.bounds.data import X
from tests.models import GlobalNormal, NormalNormal, TwoLayer
from tests.registry import EVERY_ESTIMATOR, VECTORIZE


@VECTORIZE
@EVERY_ESTIMATOR
def test_all_ways_to_a_loss_agree(make, smallest, vectorize):
    programs = TwoLayer(X)
    elbo = make(max(smallest, 3), vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(programs.model, programs.guide, pyro.optim.SGD({"lr": 0.0}), elbo)
    calls = {
        "loss": lambda: elbo.loss(programs.model, programs.guide),
        "loss_and_grads": lambda: elbo.loss_and_grads(programs.model, programs.guide),
        "differentiable_loss": lambda: elbo.differentiable_loss(programs.model, programs.guide),
        "step": svi.step,
        "evaluate_loss": svi.evaluate_loss,
    }
    found = {}
    for name, call in calls.items():
        pyro.set_rng_seed(0)
        found[name] = call()
    assert all(type(value) is float for n, value in found.items() if n != "differentiable_loss")
    assert found["differentiable_loss"].dim() == 0
    found["differentiable_loss"] = found["differentiable_loss"].item()
    assert list(found.values()) == pytest.approx([found["loss"]] * len(found))


@EVERY_ESTIMATOR
def test_smallest_number_of_particles(make, smallest):
    programs = NormalNormal(X, exact_guide=True)
    for vectorize in (True, False):
        elbo = make(smallest, vectorize_particles=vectorize)
        loss = elbo.loss(programs.model, programs.guide)
        assert loss == pytest.approx(-programs.log_evidence().sum().item())


@VECTORIZE
@pytest.mark.parametrize(
    "make", [ImportanceWeightedELBO, lambda K, **kw: JackknifeELBO(K, 0, **kw)]
)
def test_one_particle_equals_trace_elbo(make, vectorize):
    programs = TwoLayer(X)
    grads = []
    for elbo in (Trace_ELBO(), make(1, vectorize_particles=vectorize)):
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(programs.model, programs.guide)
        store = dict(pyro.get_param_store().named_parameters())
        grads.append(torch.stack([store[n].grad.clone() for n in sorted(store)]))
        for p in store.values():
            p.grad = None
        grads[-1] = torch.cat([grads[-1], torch.tensor([loss])])
    torch.testing.assert_close(*grads)


def test_value_and_gradient_equal_those_of_renyi_elbo_where_it_is_right():
    programs = TwoLayer(X)
    found = []
    for cls in (RenyiELBO, ImportanceWeightedELBO):
        elbo = cls(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(programs.model, programs.guide)
        store = dict(pyro.get_param_store().named_parameters())
        found.append(torch.stack([torch.tensor(loss)] + [store[n].grad.clone() for n in store]))
        for p in store.values():
            p.grad = None
    torch.testing.assert_close(*found)


def test_the_constructor_stores_what_it_was_given():
    elbo = JackknifeELBO(5, 2, max_plate_nesting=1, retain_graph=True)
    assert (elbo.num_particles, elbo.order, elbo.max_plate_nesting) == (5, 2, 1)
    assert elbo.vectorize_particles
    assert elbo.retain_graph
    assert elbo.gradient == "pathwise"
    assert ImportanceWeightedELBO().max_plate_nesting == math.inf


@EVERY_ESTIMATOR
def test_copies_run_alike_and_keep_no_programs(make, smallest):
    programs = NormalNormal(X)
    elbo = make(smallest + 1)
    elbo.loss(programs.model, lambda: programs.guide())  # a guide that cannot be pickled
    for twin in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo)), copy.copy(elbo)):
        assert type(twin) is type(elbo)
        losses = []
        for e in (elbo, twin):
            pyro.set_rng_seed(0)
            e.max_plate_nesting = 1
            losses.append(e.loss(programs.model, programs.guide))
        assert losses[0] == losses[1]
        elbo.max_plate_nesting = math.inf


def test_a_second_model_has_its_plates_guessed_afresh():
    flat, global_ = NormalNormal(X, exact_guide=True), GlobalNormal(X)

    def nested_model():
        with pyro.plate("outer", 2, dim=-3):
            flat.model()

    def nested_guide():
        with pyro.plate("outer", 2, dim=-3):
            flat.guide()

    elbo = ImportanceWeightedELBO(3)
    once = -flat.log_evidence().sum().item()
    assert elbo.loss(flat.model, flat.guide) == pytest.approx(once)
    assert elbo.loss(nested_model, nested_guide) == pytest.approx(2 * once)
    assert elbo.loss(flat.model, flat.guide) == pytest.approx(once)
    for _ in range(2):  # another model, and so another warning
        with pytest.warns(UserWarning, match="does not enclose"):
            elbo.loss(global_.model, global_.guide)
        elbo.loss(flat.model, flat.guide)


def test_a_nesting_that_is_too_small_is_refused_by_name():
    programs = NormalNormal(X)

    def model():
        with pyro.plate("outer", 2, dim=-2):
            programs.model()

    def guide():
        with pyro.plate("outer", 2, dim=-2):
            programs.guide()

    with pytest.raises(ValueError, match="max_plate_nesting"):
        ImportanceWeightedELBO(3, max_plate_nesting=1).loss(model, guide)
    ImportanceWeightedELBO(3, max_plate_nesting=4).loss(model, guide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_weights_are_at_least_single_precision(dtype):
    zero = torch.zeros((), dtype=dtype)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(zero, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3, dtype=dtype))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(zero, 1.0))

    found = ImportanceWeightedELBO(4).trace_particles(model, guide)
    assert found.log_w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@VECTORIZE
def test_programs_without_sites_have_no_loss(vectorize):
    elbo = ImportanceWeightedELBO(3, vectorize_particles=vectorize)
    empty = lambda: pyro.param("p", torch.tensor(0.5))  # noqa: E731
    assert elbo.loss(empty, empty) == 0
    assert elbo.loss_and_grads(empty, empty) == 0


def test_a_lone_data_point_without_plates():
    def model():
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide():
        pyro.sample("z", dist.Normal(X[0] / 2, math.sqrt(0.5)))

    expected = -NormalNormal(X[:1]).log_evidence().item()
    for vectorize in (True, False):
        elbo = ImportanceWeightedELBO(4, vectorize_particles=vectorize)
        assert elbo.loss(model, guide) == pytest.approx(expected)


def test_stochastic_structure_with_looped_particles():
    def model():
        s = pyro.sample("z0", dist.Normal(torch.tensor(0.0), 1.0))
        if s > 0:
            s = s + pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(s, 1.0), obs=torch.tensor(1.0))

    def guide():
        if pyro.sample("z0", dist.Normal(torch.tensor(0.0), 1.0)) > 0:
            pyro.sample("z1", dist.Normal(0.0, 1.0))

    elbo = ImportanceWeightedELBO(4, vectorize_particles=False)
    for seed in range(8):
        pyro.set_rng_seed(seed)
        found = elbo.trace_particles(model, guide)
        pairs = zip(found.model_traces, found.guide_traces, strict=True)
        expected = torch.stack([m.log_prob_sum() - g.log_prob_sum() for m, g in pairs])
        torch.testing.assert_close(found.log_w, expected)


def test_programs_that_do_not_compare_to_a_bool():
    @dataclass
    class Model:
        x: torch.Tensor

        def __call__(self):
            NormalNormal(self.x).model()

    elbo = ImportanceWeightedELBO(2)
    for _ in range(2):
        assert math.isfinite(elbo.loss(Model(X), NormalNormal(X).guide))


def test_retain_graph_keeps_shared_intermediates():
    logits = torch.zeros(3, requires_grad=True)
    shared = (2 * logits).exp()

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(shared, 1.0))

    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    elbo = ImportanceWeightedELBO(3, retain_graph=True)
    elbo.loss_and_grads(model, guide)
    elbo.loss_and_grads(model, guide)
    assert logits.grad.abs().sum() > 0


def test_a_step_is_captured_as_one_graph():
    """No value is looked at on the way: the hot path can be traced once and replayed."""
    from torch.fx.experimental.proxy_tensor import make_fx

    weight = torch.tensor(0.7, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weight * x, 1.0))

    def step(elbo, x):
        loss = elbo.differentiable_loss(model, guide, x)
        return loss, torch.autograd.grad(loss, weight)[0]

    for elbo in (ImportanceWeightedELBO(5), JackknifeELBO(5, order=2)):
        with pyro.validation_enabled(False):
            step(elbo, X.float())
            graph = make_fx(partial(step, elbo))(X.float())
        assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
        x = torch.linspace(-1, 1, len(X))
        pyro.set_rng_seed(4)
        expected = step(elbo, x)
        pyro.set_rng_seed(4)
        torch.testing.assert_close(graph(x), expected)
