"""An interrupted calibration returns what it has."""

import signal

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_ext.diagnostics import simulation_based_calibration

pytestmark = pytest.mark.usefixtures("python_handles_interrupts")


def model():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def exact_guides(call):
    """Exact guides, with an interrupt at a call of all guides together."""
    calls = []

    def make_guide(model, data):
        def guide():
            calls.append(len(calls))
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)
            pyro.sample("z", dist.Normal(data["x"] / 2, 0.5**0.5))

        def in_plate():
            with pyro.plate("simulations", len(data["x"])):
                guide()

        return in_plate if data["x"].dim() else guide

    return make_guide


@pytest.mark.parametrize("call", [1, 37, 50])
def test_the_draws_so_far_are_used(call):
    with pytest.warns(UserWarning, match=rf"interrupted\..* uses {call} of 50 draws") as caught:
        found = simulation_based_calibration(
            model, exact_guides(call), num_simulations=400, num_samples=50, num_steps=0
        )
    assert caught[0].filename == __file__
    assert found.probabilities["z"].shape == (400,)
    assert stats.kstest(found.probabilities["z"], "uniform").pvalue > 1e-3


def test_an_interrupt_in_training_has_nothing_to_keep():
    with pytest.raises(KeyboardInterrupt):
        simulation_based_calibration(model, exact_guides(3), num_simulations=10, num_steps=9)


@pytest.mark.parametrize("num_complete", [0, 1, 2, 7, 10])
def test_the_simulations_so_far_are_used(num_complete):
    options = {"num_simulations": 10, "num_samples": 5, "num_steps": 0, "vectorize": False}
    call = 5 * num_complete + 3 if num_complete < 10 else 50
    if num_complete == 0:
        with pytest.raises(KeyboardInterrupt):
            simulation_based_calibration(model, exact_guides(call), **options)
        return
    with pytest.warns(UserWarning, match=rf"uses {num_complete} of 10 simulations"):
        found = simulation_based_calibration(model, exact_guides(call), **options)
    assert found.probabilities["z"].shape == (num_complete,)
    assert f"Calibration({num_complete} simulations)" in repr(found)
