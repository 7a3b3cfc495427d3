"""Schedules: their factors, their state, and what they refuse."""

import copy
import pickle
from fractions import Fraction

import pytest

from pyro_ext.infer import CyclicalKL, GeometricKL, LinearKL, UniformKL

SCHEDULES = {
    "geometric": lambda: GeometricKL(5),
    "uniform": UniformKL,
    "linear": lambda: LinearKL(7, start=0.1),
    "cyclical": lambda: CyclicalKL(4, num_cycles=2),
}


@pytest.mark.parametrize("num_batches", [1, 3, 8, 60])
def test_geometric_factors_are_those_of_the_formula(num_batches):
    schedule = GeometricKL(num_batches)
    for step in range(2 * num_batches):
        i = step % num_batches + 1
        exact = Fraction(num_batches * 2 ** (num_batches - i), 2**num_batches - 1)
        assert schedule.factor == pytest.approx(float(exact), rel=1e-15)
        schedule.step()


@pytest.mark.parametrize("num_batches", [1, 3, 8, 2000, 100_000])
def test_geometric_factors_of_an_epoch_have_mean_one(num_batches):
    schedule = GeometricKL(num_batches)
    factors = [schedule.factor_at(step) for step in range(num_batches)]
    assert sum(factors) / num_batches == pytest.approx(1.0, rel=1e-12)
    assert (factors[-1] == 0.0) == (num_batches > 1074)


def test_linear_factors():
    schedule = LinearKL(num_steps=4, start=0.2)
    assert [schedule.factor_at(t) for t in (0, 2, 4, 9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_cyclical_factors_without_end():
    schedule = CyclicalKL(period=10, proportion=1.0, start=0.5, num_cycles=None)
    assert schedule.factor_at(1_000_003) == pytest.approx(0.5 + 0.5 * 0.3)


@pytest.mark.parametrize(
    ("schedule", "num_steps"),
    [(UniformKL(), 0), (GeometricKL(1), 0), (LinearKL(3), 3), (CyclicalKL(2, num_cycles=3), 6)],
)
def test_finished_from_the_first_step_on_whose_factor_stays_one(schedule, num_steps):
    for _ in range(num_steps):
        assert not schedule.finished
        schedule.step()
    assert schedule.finished
    assert schedule.factor == 1.0


@pytest.mark.parametrize("schedule", [GeometricKL(4), CyclicalKL(4, num_cycles=None)])
def test_never_finished(schedule):
    for _ in range(20):
        assert not schedule.finished
        schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_state_and_copies_continue_where_it_was(name):
    schedule = SCHEDULES[name]()
    for _ in range(3):
        schedule.step()
    resumed = SCHEDULES[name]()
    resumed.load_state_dict(schedule.state_dict())
    twins = [resumed, copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))]
    for _ in range(6):
        for twin in twins:
            assert twin.factor == schedule.factor == twin.factor_tensor.item()
            twin.step()
        schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tensor_is_one_and_follows(name):
    schedule = SCHEDULES[name]()
    tensor = schedule.factor_tensor
    for _ in range(6):
        assert tensor is schedule.factor_tensor
        assert tensor.item() == schedule.factor
        schedule.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GeometricKL(0), "num_batches must be at least 1, but it is 0"),
        (lambda: LinearKL(0), "num_steps must be at least 1, but it is 0"),
        (lambda: LinearKL(5, start=-0.1), r"start must be between 0 and 1, but it is -0.1"),
        (lambda: LinearKL(5, start=float("nan")), r"start must be between 0 and 1, but it is nan"),
        (lambda: CyclicalKL(-1), "period must be at least 1, but it is -1"),
        (lambda: CyclicalKL(5, proportion=0), "proportion must be positive, but it is 0"),
        (lambda: CyclicalKL(5, num_cycles=0), "num_cycles .* must be at least 1, but it is 0"),
        (
            lambda: UniformKL().load_state_dict({"epoch": 3}),
            r"'num_steps_taken' alone, but it has \['epoch'\]",
        ),
        (
            lambda: UniformKL().load_state_dict({"num_steps_taken": -3}),
            "must be at least 0, but it is -3",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_half_a_batch():
    with pytest.raises(TypeError, match=r"num_batches must be an integer >= 1, but it is 2\.5"):
        GeometricKL(2.5)
