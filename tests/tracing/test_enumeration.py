"""Marked discrete sites of a model are summed out for each particle."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO
from tests.registry import EVERY_ESTIMATOR, VECTORIZE
from tests.tracing.enumerated import (
    PROBS,
    WORDS,
    X,
    at,
    classes_of_images,
    collapsed_topics,
    dependent,
    dependent_by_hand,
    draw_means,
    encoder,
    factorial,
    guide_of_means,
    guide_of_topics,
    many_chains,
    markov_chain,
    markov_chain_by_hand,
    mixture,
    mixture_by_hand,
    nested_plates,
    one_assignment,
    one_assignment_by_hand,
    second_order,
)

pytestmark = pytest.mark.usefixtures("float64")


PAIRS = {
    "mixture": (mixture, mixture_by_hand),
    "one assignment": (one_assignment, one_assignment_by_hand),
    "dependent": (dependent, dependent_by_hand),
    "markov chain": (markov_chain, markov_chain_by_hand),
}
EVERY_PAIR = pytest.mark.parametrize(("model", "by_hand"), PAIRS.values(), ids=PAIRS)


def step(elbo, model, guide=guide_of_means, args=(X,), method="loss_and_grads"):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = getattr(elbo, method)(model, guide, *args)
    params = dict(pyro.get_param_store().named_parameters())
    return loss, {name: p.grad for name, p in params.items() if p.grad is not None}


def assert_same_step(found, expected, tol=1e-10):
    assert found[0] == pytest.approx(expected[0], rel=tol, abs=tol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=tol, atol=tol)


RULES = pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
@RULES
@EVERY_ESTIMATOR
def test_every_bound_and_rule_equals_a_sum_by_hand(make, smallest, gradient):
    elbo = make(max(4, smallest), gradient=gradient, max_plate_nesting=1)
    assert_same_step(step(elbo, dependent), step(elbo, dependent_by_hand))


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
@VECTORIZE
@EVERY_PAIR
@RULES
def test_every_structure_equals_a_sum_by_hand(gradient, model, by_hand, vectorize):
    elbo = ImportanceWeightedELBO(4, gradient, vectorize, max_plate_nesting=1)
    assert_same_step(step(elbo, model), step(elbo, by_hand))


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
@EVERY_PAIR
def test_chunks_equal_a_sum_by_hand(model, by_hand):
    elbo = ImportanceWeightedELBO(5, gradient="dreg", max_plate_nesting=1, particle_chunk_size=2)
    found, expected = [], []
    for results, program in ((found, model), (expected, by_hand)):
        for _ in range(2):  # the first step draws further numbers
            results.append(step(elbo, program))
    assert_same_step(found[1], expected[1])


# One particle: TraceEnum_ELBO


AGAINST_PYRO = {
    "mixture": (mixture, guide_of_means, X),
    "one assignment": (one_assignment, guide_of_means, X),
    "dependent": (dependent, guide_of_means, X),
    "markov chain": (markov_chain, guide_of_means, X),
    "nested plates": (nested_plates, guide_of_means, X),
    "second order": (second_order, guide_of_means, X),
    "factorial": (factorial, guide_of_means, X),
    "many chains": (many_chains, guide_of_means, X),
    "collapsed topics": (collapsed_topics, guide_of_topics, WORDS),
    "semi-supervised": (classes_of_images, encoder, X),
}


@VECTORIZE
@pytest.mark.parametrize(("model", "guide", "data"), AGAINST_PYRO.values(), ids=AGAINST_PYRO)
def test_one_particle_equals_trace_enum_elbo(model, guide, data, vectorize):
    elbo = ImportanceWeightedELBO(1, max_plate_nesting=2, vectorize_particles=vectorize)
    expected = step(TraceEnum_ELBO(max_plate_nesting=2), model, guide, (data,))
    assert_same_step(step(elbo, model, guide, (data,)), expected)


def test_automatic_guides_of_the_other_sites():
    blocked = poutine.block(mixture, hide=["a"])

    def run(elbo):
        pyro.set_rng_seed(3)
        guide = AutoNormal(blocked, init_scale=0.3)
        guide(X)
        return step_of_guide(elbo, guide)

    def step_of_guide(elbo, guide):
        pyro.set_rng_seed(0)
        loss = elbo.loss_and_grads(mixture, guide, X)
        return loss, {name: p.grad for name, p in guide.named_parameters()}

    expected = run(TraceEnum_ELBO(max_plate_nesting=1))
    assert_same_step(run(ImportanceWeightedELBO(1, max_plate_nesting=1)), expected)


def test_marked_sites_of_the_guide_are_summed_with_one_particle():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(2.0 * a - 1, 0.8), obs=x)

    @config_enumerate
    def guide(x):
        logits = pyro.param("logits", torch.zeros(len(x), 2))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Categorical(logits=logits))

    expected = step(TraceEnum_ELBO(max_plate_nesting=1), model, guide)
    for elbo in (ImportanceWeightedELBO(1), JackknifeELBO(1, order=0)):
        assert_same_step(step(elbo, model, guide), expected)
    with pytest.raises(ValueError, match=r"Site 'a' of the guide .* mark it in the model"):
        step(ImportanceWeightedELBO(3), model, guide)


# Weights, plates, scales and masks


def test_weights_stay_with_each_data_point():
    particles = ImportanceWeightedELBO(3).trace_particles(classes_of_images, encoder, (X,))
    assert particles.log_w.shape == (3, 5)
    assert [plate.name for plate in particles.plates] == ["data"]


def test_a_common_plate_may_be_subsampled():
    rows = torch.tensor([0, 3])

    def model(by_hand):
        with pyro.plate("data", 5, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if by_hand:
                loc = z.unsqueeze(-1) * torch.tensor([1.0, 2.0])
                log_prob = dist.Normal(loc, 1.0).log_prob(X[rows].unsqueeze(-1))
                pyro.factor("x", (log_prob + PROBS.log()).logsumexp(-1))
            else:
                a = pyro.sample("a", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z * (1.0 + a), 1.0), obs=X[rows])

    def guide(by_hand):
        with pyro.plate("data", 5, subsample=rows):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.7))

    elbo = ImportanceWeightedELBO(4, gradient="dreg")
    assert_same_step(step(elbo, model, guide, (False,)), step(elbo, model, guide, (True,)))


@VECTORIZE
def test_local_plate(vectorize):
    def model(by_hand):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            if by_hand:
                loc = z.unsqueeze(-1) * torch.tensor([1.0, 2.0])
                log_prob = dist.Normal(loc, 1.0).log_prob(X.unsqueeze(-1))
                pyro.factor("x", (log_prob + PROBS.log()).logsumexp(-1))
            else:
                a = pyro.sample("a", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(z * (1.0 + a), 1.0), obs=X)

    def guide(by_hand):
        mean = pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.7))
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(0.5 * mean, pyro.param("scale", torch.tensor(0.9))))

    elbo = ImportanceWeightedELBO(
        4, local_plate="data", vectorize_particles=vectorize, max_plate_nesting=1
    )
    assert_same_step(step(elbo, model, guide, (False,)), step(elbo, model, guide, (True,)))


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
@pytest.mark.parametrize("scale", [0.4, torch.tensor([0.5, 1.0, 2.0, 0.3, 0.7])])
def test_scales_multiply_the_sum(scale):
    def scaled(model):
        def run(x):
            means = draw_means()
            with pyro.plate("data", len(x)), poutine.scale(scale=scale):
                model(x, means)

        return run

    @config_enumerate
    def summed(x, means):
        a = pyro.sample("a", dist.Categorical(PROBS))
        pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)

    def by_hand(x, means):
        log_prob = dist.Normal(means, 0.8).log_prob(x.unsqueeze(-1)) + PROBS.log()
        pyro.factor("x", log_prob.logsumexp(-1))

    elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
    assert_same_step(step(elbo, scaled(summed)), step(elbo, scaled(by_hand)))


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
def test_masked_data_are_left_out():
    keep = torch.tensor([True, False, True, True, False])

    @config_enumerate
    def model(x):
        means = draw_means()
        with pyro.plate("data", len(x)), poutine.mask(mask=keep):
            a = pyro.sample("a", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)

    elbo = ImportanceWeightedELBO(4, max_plate_nesting=1)
    assert_same_step(step(elbo, model), step(elbo, mixture_by_hand, args=(X[keep],)))


@pytest.mark.filterwarnings("ignore:Plate 'data' holds")
def test_more_particles_tend_to_the_evidence():
    grid = torch.linspace(-8.0, 8.0, 401)
    means = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    log_joint = dist.Normal(0.0, 1.5).log_prob(means).sum(-1)
    for value in X:
        log_joint += (dist.Normal(means, 0.8).log_prob(value) + PROBS.log()).logsumexp(-1)
    exact = (log_joint.flatten().logsumexp(0) + 2 * math.log(grid[1] - grid[0])).item()

    def guide(x):
        pyro.sample("means", dist.Normal(torch.zeros(2), 1.5).to_event(1))

    pyro.set_rng_seed(0)
    bounds = []
    for K, repeats in ((1, 300), (10, 200), (1000, 100)):
        elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
        values = torch.tensor([-elbo.loss(mixture, guide, X) for _ in range(repeats)])
        bounds.append((values.mean().item(), values.std().item() / math.sqrt(repeats)))
    (first, _), (second, _), (last, error) = bounds
    assert first < second < exact + 4.5 * error
    # The bias of 1,000 particles is half of the variance of a weight over K.
    assert abs(last - exact) < 4.5 * error + 0.01
