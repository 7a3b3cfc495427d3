"""Expectations against closed forms, with and without observations; a rare event."""

import math
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import estimate_expectation

F64 = {"dtype": torch.float64}


def normal(function, loc=0.0, scale=1.0, observe=False):
    """A model that returns a function of a normal draw, and a guide."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        if observe:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0, **F64))
        return function(z)

    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(loc, **F64), scale))

    return model, guide


def within(found, exact, num_errors=4.5):
    return bool(((found.value - exact).abs() <= num_errors * found.std_error).all())


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 7, None])
@pytest.mark.parametrize("max_plate_nesting", [0, 2, math.inf])
def test_moments_without_observations(chunk_size, max_plate_nesting):
    model, guide = normal(lambda z: torch.stack([z, z**2, z.exp()], -1), loc=0.3, scale=1.3)
    found = estimate_expectation(
        model,
        guide,
        num_samples=500,
        chunk_size=chunk_size,
        max_plate_nesting=max_plate_nesting,
    )
    assert found.value.shape == (3,)
    assert not found.is_self_normalized
    assert within(found, torch.tensor([0.0, 1.0, math.exp(0.5)], **F64))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:estimate_expectation. Pareto k")
def test_the_reported_error_is_the_error():
    model, guide = normal(lambda z: z**2, loc=0.5, scale=1.5)
    runs = [
        estimate_expectation(model, guide, num_samples=200, chunk_size=200, max_plate_nesting=0)
        for _ in range(300)
    ]
    z = torch.stack([(run.value - 1.0) / run.std_error for run in runs])
    assert 0.85 < z.std() < 1.2


@pytest.mark.long
@pytest.mark.parametrize("with_guide", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_posterior_means_are_self_normalized(with_guide):
    model, guide = normal(lambda z: torch.stack([z, z**2], -1), loc=0.5, scale=1.0, observe=True)
    found = estimate_expectation(model, guide if with_guide else None, num_samples=20_000)
    assert found.is_self_normalized
    assert within(found, torch.tensor([0.5, 0.75], **F64))
    runs = [
        estimate_expectation(model, guide, num_samples=200, chunk_size=200, max_plate_nesting=0)
        for _ in range(200)
    ]
    errors = torch.stack([(run.value - torch.tensor([0.5, 0.75])) / run.std_error for run in runs])
    assert ((errors.std(0) > 0.8) & (errors.std(0) < 1.25)).all()


def test_plates_share_one_weight():
    x = torch.tensor([1.0, -2.0], **F64)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return torch.cat([z, z.prod(-1, keepdim=True)], -1)

    def guide():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    found = estimate_expectation(model, guide, num_samples=20_000)
    assert within(found, torch.tensor([0.5, -1.0, -0.5], **F64))


MEANS = (4.0, 4.0, 2.0, 5.0, 2.0, 3.0, 2.0, 3.0, 2.0, 2.0)
BEFORE = ((), (0,), (0,), (1,), (1,), (2,), (2,), (2,), (4, 5, 6), (3, 7, 8))


def project_is_late():
    """Ten exponential tasks, each of which begins after others end: whether the last is late."""
    ends = []
    for i, (mean, before) in enumerate(zip(MEANS, BEFORE, strict=True)):
        duration = pyro.sample(f"t{i}", dist.Exponential(torch.tensor(1 / mean, **F64)))
        start = 0.0
        for j in before:
            start = torch.maximum(torch.as_tensor(start, **F64), ends[j])
        ends.append(start + duration)
    return (ends[-1] > 70).double()


def longer_tasks(factors):
    def guide():
        for i, mean in enumerate(MEANS):
            rate = torch.tensor(1 / (mean * factors.get(i, 1.0)), **F64)
            pyro.sample(f"t{i}", dist.Exponential(rate))

    return guide


@pytest.mark.parametrize(
    ("factors", "error_at_10_000"),
    [(dict.fromkeys((0, 1, 3, 9), 2.0), 3.78e-6), (dict.fromkeys((0, 1, 3, 9), 3.0), 3.32e-6)],
    ids=["critical path x 2", "critical path x 3"],
)
def test_a_rare_event(factors, error_at_10_000):
    """Owen (2013), chapter 9; the probability and the errors are exact, by a Markov chain."""
    n = 200_000
    found = estimate_expectation(
        project_is_late,
        longer_tasks(factors),
        num_samples=n,
        chunk_size=20_000,
        max_plate_nesting=0,
    )
    exact_error = error_at_10_000 * math.sqrt(10_000 / n)
    assert abs(found.value.item() - 3.211525e-5) < 4.5 * exact_error
    assert 0.3 * exact_error < found.std_error.item() < 2 * exact_error


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.sum(),
        lambda z: z.mean(0),
        lambda z: torch.arange(2.0),
        lambda z: z.expand(5, *z.shape),
    ],
    ids=["sum", "mean(0)", "constant", "last"],
)
def test_values_without_the_dim_of_the_particles_are_refused(function):
    model, guide = normal(function)
    for num_samples in (2, 5, 50):
        with pytest.raises(ValueError, match=r"first dim .* must be the dim of the particles"):
            estimate_expectation(model, guide, num_samples=num_samples)


@pytest.mark.long
def test_any_reduction_is_right_one_by_one():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        return z.sum() ** 2

    assert within(estimate_expectation(model, num_samples=300, chunk_size=1), 3.0)


@pytest.mark.parametrize("chunk_size", [1, 10])
@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 3), (3, 1)])
def test_plates_keep_their_dims(sizes, chunk_size):
    def model():
        with ExitStack() as stack:
            for i, size in enumerate(reversed(sizes)):
                stack.enter_context(pyro.plate(f"p{i}", size, dim=-i - 1))
            return pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))

    found = estimate_expectation(model, num_samples=20, chunk_size=chunk_size)
    assert found.value.shape == sizes


@pytest.mark.parametrize("observe", [False, True])
def test_large_means_do_not_cancel(observe):
    model, guide = normal(lambda z: 1e9 + z, loc=0.25, scale=1.0, observe=observe)
    reference, _ = normal(lambda z: z, observe=observe)
    errors = []
    for program in (model, reference):
        pyro.set_rng_seed(2)
        options = {"num_samples": 5000, "max_plate_nesting": 0}
        errors.append(estimate_expectation(program, None if not observe else guide, **options))
    assert errors[0].std_error.item() == pytest.approx(errors[1].std_error.item(), rel=1e-4)


def test_sizes_that_would_underflow():
    model, guide = normal(lambda z: (z > 30).double(), loc=30.0)
    found = estimate_expectation(model, guide, num_samples=20_000)
    log_probability = torch.special.log_ndtr(torch.tensor(-30.0, **F64))
    assert abs(found.value / log_probability.exp() - 1) < 4.5 * found.std_error / found.value
    assert found.std_error > 0


def test_values_are_looked_at_where_the_weight_is_not_zero():
    def model():
        z = pyro.sample("z", dist.HalfNormal(torch.ones((), **F64)))
        return z.sqrt()

    def guide():
        pyro.sample("z", dist.Normal(torch.ones((), **F64), 1.5))

    with pyro.validation_enabled(False):
        found = estimate_expectation(model, guide, num_samples=5000)
    assert within(found, 2**0.25 * math.gamma(0.75) / math.sqrt(math.pi))


def test_a_guide_at_one_point_is_warned_of():
    model, _ = normal(lambda z: z + 5)
    with pytest.warns(UserWarning, match="puts site 'z' at one point"):
        estimate_expectation(model, lambda: pyro.sample("z", dist.Delta(torch.tensor(0.0))))


def test_a_narrow_guide_is_warned_of():
    model, guide = normal(lambda z: z**2, scale=0.3)
    with pytest.warns(UserWarning, match=r"Pareto k is above 0\.7 for 1 of 1 values"):
        estimate_expectation(model, guide)


def test_extreme_weights_do_not_overflow():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), **F64), 1.0))
        pyro.factor("large", torch.tensor(5000.0, **F64))
        return z

    found = estimate_expectation(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.1)))
    assert within(found, 0.0)
    assert "self-normalised" in repr(found)


def test_an_event_that_was_not_seen_is_warned_of():
    model, _ = normal(lambda z: (z > 9).double())
    with pytest.warns(UserWarning, match="each of 100 draws gave zero for 1 of 1 values"):
        found = estimate_expectation(model, num_samples=100)
    assert found.value == 0


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda z: z * math.nan, {}, "the model returned NaN or infinity"),
        (lambda z: z * math.inf, {}, "NaN or infinity for a draw whose weight is not zero"),
        (lambda z: z, {"num_samples": 0}, "num_samples must be at least 1, but it is 0"),
        (lambda z: z, {"chunk_size": -1}, "chunk_size must be at least 1, but it is -1"),
    ],
)
def test_errors(function, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_expectation(*normal(function), **options)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: None, "the model returns must be a real tensor, but it is None"),
        (lambda z: z * 1j, r"a real tensor, but its dtype is torch\.complex128"),
    ],
)
def test_models_that_return_something_else(function, message):
    with pytest.raises(TypeError, match=message):
        estimate_expectation(*normal(function))


def test_weights_that_are_all_zero():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", -math.inf + 0 * z)
        return z

    with pytest.raises(ValueError, match="all 10 weights are zero"):
        estimate_expectation(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=10)
