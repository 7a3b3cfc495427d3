"""Marked discrete sites of a model are summed out for each particle."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO
from tests.registry import EVERY_ESTIMATOR, VECTORIZE

pytestmark = pytest.mark.usefixtures("_double")
X = torch.tensor([-1.3, 0.4, 1.7, 2.2, -0.6], dtype=torch.float64)
PROBS = torch.tensor([0.3, 0.7], dtype=torch.float64)
TRANSITIONS = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def at(values, index):
    """values[..., index], with particles to the left of the plates of the index."""
    return Vindex(values)[..., index]


def guide_of_means(*_, num_states=2):
    loc = pyro.param("loc", torch.linspace(-1.0, 1.0, num_states))
    scale = pyro.param("scale", torch.full((num_states,), 0.4), dist.constraints.positive)
    pyro.sample("means", dist.Normal(loc, scale).to_event(1))


def draw_means(num_states=2):
    return pyro.sample("means", dist.Normal(torch.zeros(num_states), 1.5).to_event(1))


@config_enumerate
def mixture(x):
    means = draw_means()
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(PROBS))
        pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


def mixture_by_hand(x):
    means = draw_means()
    with pyro.plate("data", len(x)):
        log_prob = dist.Normal(means, 0.8).log_prob(x.unsqueeze(-1)) + PROBS.log()
        pyro.factor("x", log_prob.logsumexp(-1))


@config_enumerate
def one_assignment(x):
    means = draw_means()
    a = pyro.sample("a", dist.Bernoulli(PROBS[1])).long()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


def one_assignment_by_hand(x):
    means = draw_means()
    rows = dist.Normal(means, 0.8).log_prob(x.unsqueeze(-1)).sum(-2)
    pyro.factor("x", (rows + PROBS.log()).logsumexp(-1).reshape(means.shape[:-1]))


@config_enumerate
def dependent(x):
    means = draw_means()
    a = pyro.sample("a", dist.Categorical(PROBS))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Categorical(TRANSITIONS[a]))
        c = pyro.sample("c", dist.Categorical(TRANSITIONS[b]))
        pyro.sample("x", dist.Normal(at(means, c) + 0.3 * b, 0.8), obs=x)


def dependent_by_hand(x):
    means = draw_means()
    loc = means.unsqueeze(-2) + 0.3 * torch.arange(2.0).unsqueeze(-1)  # (..., b, c)
    log_prob = dist.Normal(loc, 0.8).log_prob(x[:, None, None])
    of_b = (log_prob + TRANSITIONS.log()).logsumexp(-1)  # (..., x, b)
    of_a = (of_b.unsqueeze(-2) + TRANSITIONS.log()).logsumexp(-1).sum(-2)  # (..., a)
    pyro.factor("x", (of_a + PROBS.log()).logsumexp(-1).reshape(means.shape[:-1]))


@config_enumerate
def markov_chain(x):
    means = draw_means()
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, z), 0.8), obs=x[t])


def markov_chain_by_hand(x):
    means = draw_means()
    alpha = TRANSITIONS[0].log()
    for value in x:
        alpha = alpha + dist.Normal(means, 0.8).log_prob(value)
        total = alpha.logsumexp(-1)
        alpha = (alpha.unsqueeze(-1) + TRANSITIONS.log()).logsumexp(-2)
    pyro.factor("x", total)


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


@config_enumerate
def nested_plates(x):
    means = draw_means()
    with pyro.plate("groups", 2, dim=-2):
        g = pyro.sample("g", dist.Categorical(PROBS))
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(TRANSITIONS[g]))
            pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


@config_enumerate
def second_order(x):
    means = draw_means()
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]])
    before, now = 0, 0
    for t in pyro.markov(range(len(x)), history=2):
        before, now = now, pyro.sample(f"z_{t}", dist.Categorical(Vindex(probs)[before, now]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, now), 0.8), obs=x[t])


@config_enumerate
def factorial(x):
    means = draw_means()
    w = z = 0
    for t in pyro.markov(range(len(x))):
        w = pyro.sample(f"w_{t}", dist.Categorical(TRANSITIONS[w]))
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, w) - 0.5 * z, 0.8), obs=x[t])


@config_enumerate
def many_chains(x):
    means = draw_means()
    lengths = torch.tensor([3, 5])
    with pyro.plate("chains", 2, dim=-1):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(len(x))):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
                pyro.sample(f"x_{t}", dist.Normal(at(means, z), 0.8), obs=x[t].expand(2))


@config_enumerate
def collapsed_topics(words):
    topics = pyro.sample("topics", dist.Dirichlet(torch.ones(2, 4)).to_event(1))
    with pyro.plate("documents", 3, dim=-1):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", 5, dim=-2):
            topic = pyro.sample("topic", dist.Categorical(weights))
            pyro.sample("word", dist.Categorical(Vindex(topics)[..., topic, :]), obs=words)


def guide_of_topics(words):
    topics = pyro.param("topics_q", torch.ones(2, 4) + torch.eye(4)[:2])
    pyro.sample("topics", dist.Dirichlet(topics).to_event(1))
    with pyro.plate("documents", 3, dim=-1):
        weights = pyro.param("weights_q", torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.5, 1.5]]))
        pyro.sample("weights", dist.Dirichlet(weights))


WORDS = torch.tensor([[0, 1, 2], [3, 0, 1], [1, 1, 0], [2, 3, 3], [0, 0, 2]])


@config_enumerate
def classes_of_images(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Categorical(PROBS))
        weight = pyro.param("weight", torch.tensor([[0.4, -0.2], [0.1, 0.7]]))
        pyro.sample("x", dist.Normal((z * weight[y]).sum(-1), 1.0), obs=x)


def encoder(x):
    slope = pyro.param("slope", torch.tensor([0.2, -0.3]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.unsqueeze(-1) * slope, 0.6).to_event(1))


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
    for K, repeats in ((1, 400), (10, 400), (1000, 400)):
        elbo = ImportanceWeightedELBO(K, max_plate_nesting=1)
        values = torch.tensor([-elbo.loss(mixture, guide, X) for _ in range(repeats)])
        bounds.append((values.mean().item(), values.std().item() / math.sqrt(repeats)))
    (first, _), (second, _), (last, error) = bounds
    assert first < second < exact + 4.5 * error
    # The bias of 1,000 particles is half of the variance of a weight over K.
    assert abs(last - exact) < 4.5 * error + 0.01


# Bad input


def bad(kind):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        marked = {"enumerate": "parallel"}
        if kind == "infinite":
            count = pyro.sample("count", dist.Poisson(3.0), infer=marked)
            pyro.sample("x", dist.Normal(mean + count, 1.0), obs=x[0])
        elif kind == "sequential":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})
            pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "drawn":
            infer = {**marked, "num_samples": 4}
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=infer)
            pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "subsampled":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
            with pyro.plate("data", 5, subsample=torch.tensor([0, 1])):
                pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[:2])
        elif kind == "scale":
            a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
            with poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "dims":
            for i in range(70):
                a = pyro.sample(f"a_{i}", dist.Bernoulli(0.5), infer=marked)
                pyro.sample(f"x_{i}", dist.Normal(mean + a, 1.0), obs=x[0])
        elif kind == "mask":
            with pyro.plate("chains", 5):
                with poutine.mask(mask=torch.arange(5) < 2):
                    a = pyro.sample("a", dist.Bernoulli(0.5), infer=marked)
                b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a), infer=marked)
                pyro.sample("x", dist.Normal(mean + b, 1.0), obs=x)

    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("infinite", "Site 'count' is marked for enumeration, but Poisson has no support"),
        ("sequential", "Site 'a' is marked for sequential enumeration"),
        ("drawn", "Site 'a' is marked for enumeration with num_samples="),
        ("subsampled", r"Sites 'a' and 'x' .* different scales: 1 and 2.5 \(plate 'data'\)"),
        ("scale", "Sites 'a' and 'x' are summed out together, but have different scales: 1 and 2"),
        ("dims", r"Site 'a_\d+' is enumerated along dim -65, but tensors have at most 64 dims"),
        ("mask", "A mask hides site 'a' where it does not hide site 'b', .* in plate 'chains'"),
    ],
)
def test_sums_that_are_not_possible_are_errors(kind, message):
    def guide(x):
        pyro.sample("mean", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    for K in (1, 3):
        with pytest.raises(ValueError, match=message):
            step(ImportanceWeightedELBO(K), bad(kind), guide)
