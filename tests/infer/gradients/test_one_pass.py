"""The gradients of ``"dreg"`` and ``"stl"`` from one backward pass are those from two."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import nn

from pyro_ext.infer import (
    ImportanceWeightedELBO,
    JackknifeELBO,
    PartiallyImportanceWeightedELBO,
)
from pyro_ext.infer.gradients import rules
from pyro_ext.infer.gradients.two_pass import LinearBound
from tests.infer.gradients.estimates import F64, gradient, stored_parameters
from tests.infer.gradients.test_guide_families import AUTOGUIDES
from tests.models import TwoLayer
from tests.registry import EVERY_ESTIMATOR, VECTORIZE, PublishedJackknife


class BackwardCount(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        BackwardCount.passes += 1
        return gradient


def parameter(name, value):
    return pyro.param(name, torch.tensor(value, **F64))


X = torch.tensor([0.4, 1.5, -0.7], **F64)


def decode(*latents):
    """An observation of the latents, with a parameter of its own."""
    x = BackwardCount.apply(torch.tanh(sum(latents) * parameter("weight", 0.8)))
    pyro.sample("x", dist.Normal(x, 0.7), obs=X)


def layers_model():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(parameter("loc", 0.1), 1.0))
        b = pyro.sample("b", dist.Normal(a.sin(), 1.2))
        decode(a, b)


def layers_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(slope * X, scale))
        pyro.sample("b", dist.Normal(slope * a + X, scale * (1 + a**2)))


def discrete_model():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(0 * X, 1.0))
        d = pyro.sample("d", dist.Bernoulli(torch.sigmoid(a)))
        b = pyro.sample("b", dist.Normal(d * a, 1.0))
        decode(a, b, d)


def discrete_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(slope * X, scale))
        d = pyro.sample("d", dist.Bernoulli(logits=slope + a))
        pyro.sample("b", dist.Normal(slope * a + d, scale))


def point_model():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(0 * X, 1.0))
        b = pyro.sample("b", dist.LogNormal(a, 1.0))
        c = pyro.sample("c", dist.Normal(b, 1.0))
        decode(a, b, c)


def point_guide():
    """Of the points, b depends on a draw, and c on parameters."""
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(slope * X, scale))
        pyro.sample("b", dist.Delta(a.exp(), -a))
        pyro.sample("c", dist.Delta(slope * X))


def mixed_point_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(slope * X, scale))
        pyro.sample("b", dist.Delta((scale * a).exp(), -a))
        pyro.sample("c", dist.Delta(slope * X))


def events_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, **F64), 1.0).to_event(1))
        with pyro.plate("inner", 2):
            pyro.sample("w", dist.Gamma(2 + torch.zeros(2, 1, **F64), 1.0))
        decode(z[..., 0], z[..., 1])


def events_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        loc = slope * torch.stack([X, -X], -1)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))
        with pyro.plate("inner", 2):
            pyro.sample("w", dist.Gamma(2 + slope * torch.ones(2, 1, **F64), 1.5))


def masked_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        with poutine.mask(mask=X > 0):
            a = pyro.sample("a", dist.Normal(slope * X, scale))
        pyro.sample("b", dist.Normal(slope * a + X, scale))


def masked_model():
    with pyro.plate("data", 3):
        with poutine.mask(mask=X > 0):
            a = pyro.sample("a", dist.Normal(parameter("loc", 0.1), 1.0))
        b = pyro.sample("b", dist.Normal(a.sin(), 1.2))
        decode(a, b)


def global_model():
    g = pyro.sample("g", dist.Normal(torch.tensor(0.2, **F64), 1.0))
    with pyro.plate("data", 3):
        b = pyro.sample("b", dist.Normal(g, 1.2))
        decode(g, b)


def global_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    g = pyro.sample("g", dist.Normal(slope, scale))
    with pyro.plate("data", 3):
        pyro.sample("b", dist.Normal(slope * X + g, scale))


def early_point_guide():
    """A point of parameters, on which later draws of the guide depend."""
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        c = pyro.sample("c", dist.Delta(slope * X))
        a = pyro.sample("a", dist.Normal(2 * c, scale))
        pyro.sample("b", dist.Delta(a.exp(), -a))


def global_point_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    g = pyro.sample("g", dist.Delta(slope.exp()))
    with pyro.plate("data", 3):
        pyro.sample("b", dist.Normal(slope * X + g, scale))


def all_points_guide():
    slope = parameter("slope", 0.3)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Delta(slope * X))
        pyro.sample("b", dist.Delta(slope + a))


def unscored_guide():
    slope, scale = parameter("slope", 0.3), parameter("scale", 0.6)
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(slope * X, scale).mask(False))
        pyro.sample("b", dist.Normal(a, 2 * scale).mask(False))


def unscored_model():
    with pyro.plate("data", 3):
        a = pyro.sample("a", dist.Normal(parameter("loc", 0.1), 1.0).mask(False))
        b = pyro.sample("b", dist.Normal(a, 1.2).mask(False))
        decode(a, b)


class Leak:
    """A guide that gives a draw to the model without a site."""

    def guide(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(parameter("slope", 0.3) * X, 0.8))
            self.shift = z.tanh()

    def model(self):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0 * X, 1.0))
            decode(z, self.shift)


LEAK = Leak()

#: name -> (model, guide, options, whether "dreg" takes one pass; None if no rule takes two)
PAIRS = {
    "early point": (point_model, early_point_guide, {}, True),
    "global point": (global_model, global_point_guide, {"local_plate": "data"}, True),
    "points only": (layers_model, all_points_guide, {}, None),
    "no densities": (unscored_model, unscored_guide, {}, False),
    "a draw beside its site": (LEAK.model, LEAK.guide, {}, False),
    "two layers": (layers_model, layers_guide, {}, True),
    "chunks": (layers_model, layers_guide, {"particle_chunk_size": 2}, True),
    "discrete sites": (discrete_model, discrete_guide, {}, True),
    "points": (point_model, point_guide, {}, True),
    "points of draws and parameters": (point_model, mixed_point_guide, {}, False),
    "event dims": (events_model, events_guide, {}, True),
    "masks": (masked_model, masked_guide, {}, False),
    "no common plate": (global_model, global_guide, {}, True),
    "local plate": (global_model, global_guide, {"local_plate": "data"}, False),
}


BOUNDS = {
    "importance-weighted": ImportanceWeightedELBO,
    "jackknife": JackknifeELBO,
    "published jackknife": PublishedJackknife,
    "partially importance-weighted": partial(PartiallyImportanceWeightedELBO, num_groups=2),
}


def of_two_passes(monkeypatch):
    monkeypatch.setattr(rules, "set_ratios", lambda *_: None)


def gradients(elbo, model, guide, parameters):
    """Estimates of five seeds, with the numbers of passes through the decoder."""
    found, passes = [], []
    for seed in range(5):
        for param in parameters:
            param.grad = None
        pyro.set_rng_seed(seed)
        BackwardCount.passes = 0
        elbo.loss_and_grads(model, guide)
        passes.append(BackwardCount.passes)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append(torch.stack(grads))
    return torch.stack(found), passes


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
@VECTORIZE
@pytest.mark.parametrize("rule", ["stl", "dreg"])
@pytest.mark.parametrize(
    ("model", "guide", "options", "is_single"), PAIRS.values(), ids=PAIRS.keys()
)
@pytest.mark.parametrize("make", BOUNDS.values(), ids=BOUNDS)
def test_one_pass_gives_the_gradients_of_two(
    make, model, guide, options, is_single, rule, vectorize, monkeypatch
):
    elbo = make(6, gradient=rule, vectorize_particles=vectorize, max_plate_nesting=2, **options)
    parameters = stored_parameters(elbo, model, guide)
    found, passes = gradients(elbo, model, guide, parameters)
    of_two_passes(monkeypatch)
    expected, more = gradients(elbo, model, guide, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    trains_both = elbo.gradient_bound.guide_bound is elbo.gradient_bound
    if is_single is not None and trains_both and (is_single or rule == "stl"):
        assert max(passes) < min(more)
    else:
        assert passes == more


@pytest.mark.parametrize("rule", ["stl", "dreg"])
@EVERY_ESTIMATOR
def test_every_estimator_has_the_gradients_of_two_passes(make, smallest, rule, monkeypatch):
    programs = TwoLayer(torch.tensor([0.3, -0.6], **F64))
    for K in (smallest, 6):
        elbo = make(K, gradient=rule, max_plate_nesting=1)
        parameters = stored_parameters(elbo, programs.model, programs.guide)
        with monkeypatch.context() as patch:
            found = gradient(elbo, programs.model, programs.guide, parameters, 0)
            of_two_passes(patch)
            expected = gradient(elbo, programs.model, programs.guide, parameters, 0)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule", ["stl", "dreg"])
@pytest.mark.parametrize(("model", "make_guide"), AUTOGUIDES.values(), ids=AUTOGUIDES)
@pytest.mark.usefixtures("float64")
def test_automatic_guides_have_the_gradients_of_two_passes(model, make_guide, rule, monkeypatch):
    guide = make_guide(model)
    elbo = ImportanceWeightedELBO(4, gradient=rule, max_plate_nesting=1)
    parameters = stored_parameters(elbo, model, guide)
    found = gradient(elbo, model, guide, parameters, 0)
    of_two_passes(monkeypatch)
    expected = gradient(elbo, model, guide, parameters, 0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_decoder_of_an_automatic_guide_has_one_backward_pass():
    weight = nn.Parameter(torch.tensor(0.8))

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(3), 1.0))
            x = BackwardCount.apply(z * weight)
            pyro.sample("x", dist.Normal(x, 1.0), obs=X.float())

    elbo = ImportanceWeightedELBO(4, gradient="dreg", max_plate_nesting=1)
    guide = autoguide.AutoNormal(model)
    BackwardCount.passes = 0
    elbo.loss_and_grads(model, guide)
    assert BackwardCount.passes == 1


@pytest.mark.parametrize("first", [0.0, 1e-300, -1e-20, 0.3])
def test_a_coefficient_of_zero_keeps_the_paths_of_its_particle(first, monkeypatch):
    """Where f_k of a jackknife is zero, its f_kk may not be."""
    first = torch.tensor([first, 0.0], **F64)[:, None].expand(2, 3)
    second = torch.tensor([0.2, 0.0], **F64)[:, None].expand(2, 3)
    bound = LinearBound(first, second, signal=None, own_guide_bound=None)
    rule, elbo = rules.GRADIENT_RULES["dreg"], ImportanceWeightedELBO(2, "dreg")
    parameters = stored_parameters(elbo, layers_model, layers_guide)
    found = []
    for is_single in (True, False):
        if not is_single:
            of_two_passes(monkeypatch)
        pyro.set_rng_seed(0)
        particles = elbo.trace_particles(layers_model, layers_guide)
        found.append(torch.autograd.grad(rule.objective(bound, particles), parameters))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-18)
    assert found[0][1] != 0


def test_a_graph_that_an_objective_has_opened_serves_no_other():
    elbo = ImportanceWeightedELBO(3, "dreg", max_plate_nesting=2)
    particles = elbo.trace_particles(layers_model, layers_guide)
    rules.GRADIENT_RULES["dreg"].objective(elbo, particles)
    with pytest.raises(RuntimeError, match="opened the graph of these particles"):
        rules.GRADIENT_RULES["stl"].objective(elbo, particles)


def test_objectives_of_two_passes_share_particles():
    elbo = PartiallyImportanceWeightedELBO(4, 2, gradient="dreg", max_plate_nesting=2)
    parameters = stored_parameters(elbo, layers_model, layers_guide)
    both = []
    for names in (["dreg", "stl"], ["dreg"], ["stl"]):
        pyro.set_rng_seed(0)
        particles = elbo.trace_particles(layers_model, layers_guide)
        loss = sum(rules.GRADIENT_RULES[name].objective(elbo, particles) for name in names)
        both.append(torch.stack(torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(both[0], both[1] + both[2])
