"""A schedule that nobody steps is noticed."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_ext.infer import CyclicalKL, EagerSVI, GeometricKL, KLWeightedELBO, LinearKL, UniformKL
from tests.infer.kl.objectives import ConstantKL


class Late(LinearKL):
    """A factor that starts to rise late."""

    def factor_at(self, step):
        return super().factor_at(max(0, step - 450))


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def make(schedule, kind=SVI):
    elbo = KLWeightedELBO(Trace_ELBO(), schedule)
    return kind(model, guide, Adam({"lr": 1e-4}), elbo), torch.tensor(1.0)


def warnings_of(num_steps, step, svi, x):
    """The steps that warned."""
    found = []
    for i in range(num_steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(x)
        found += [(i + 1, warning) for warning in caught]
    return found


@pytest.mark.parametrize("schedule", [LinearKL(5), GeometricKL(3), CyclicalKL(8)])
def test_warns_once(schedule):
    svi, x = make(schedule)
    ((step, warning),) = warnings_of(700, svi.step, svi, x)
    assert step == 300
    assert warning.filename == __file__
    text = str(warning.message)
    assert f"300 losses were evaluated while {type(schedule).__name__} stood still" in text
    assert "Call schedule.step() after each optimiser step" in text


def test_warns_once_the_factor_would_have_changed():
    svi, x = make(Late(5))
    assert [step for step, _ in warnings_of(700, svi.step, svi, x)] == [600]


@pytest.mark.parametrize(
    "schedule", [UniformKL(), LinearKL(5, start=1.0), GeometricKL(1), ConstantKL(0.5)]
)
def test_never_warns_if_steps_change_nothing(schedule):
    svi, x = make(schedule)
    assert warnings_of(650, svi.step, svi, x) == []


def test_never_warns_if_the_schedule_moves():
    svi, x = make(LinearKL(5))
    schedule = svi.loss.__self__.schedule

    def step(x):
        svi.step(x)
        count.append(0)
        if len(count) % 200 == 0:  # gradients of several minibatches may add up
            schedule.step()

    count = []
    assert warnings_of(650, step, svi, x) == []
    schedule = LinearKL(500)
    svi, x = make(schedule, EagerSVI)
    svi.run(650, 1, False, args=(x,))
    assert schedule.finished


def test_losses_without_gradients_do_not_count():
    svi, x = make(LinearKL(5))
    elbo = svi.loss.__self__
    with torch.no_grad():
        for loss in (elbo.loss, elbo.differentiable_loss):
            assert (
                warnings_of(310, lambda x, loss=loss: loss(svi.model, svi.guide, x), svi, x) == []
            )
    for _ in range(299):
        elbo.note_loss()
    with pytest.warns(UserWarning, match="stood still at step 0, with the factor 0"):
        elbo.differentiable_loss(svi.model, svi.guide, x)
