"""Simulation-based calibration of guides that are exact, too narrow, too wide or biased."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from scipy import stats
from torch import nn

from pyro_ext.diagnostics import simulation_based_calibration

ZEROS = torch.zeros(3, dtype=torch.float64)


def model():
    """z ~ N(0, 1), three observations of N(z, 1): the posterior is N(sum / 4, 1 / 4)."""
    z = pyro.sample("z", dist.Normal(ZEROS.new_zeros(()), 1.0))
    with pyro.plate("data", 3):
        pyro.sample("x", dist.Normal(z, 1.0), obs=ZEROS)


def guides(shift=0.0, factor=1.0):
    def make_guide(model, data):
        def guide():
            x = data["x"]
            loc = x.sum(-1, keepdim=True) / 4 + shift
            with pyro.plate("simulations", len(x), dim=-2):
                pyro.sample("z", dist.Normal(loc, 0.5 * factor))

        return guide

    return make_guide


def test_the_exact_guide_passes_at_the_level_of_the_tests():
    p_values = {"symmetry": [], "uniformity": []}
    for _ in range(200):
        found = simulation_based_calibration(
            model, guides(), num_steps=0, num_simulations=100, num_samples=20
        )
        p_values["symmetry"].append(found.symmetry_p_values["z"].item())
        p_values["uniformity"].append(found.uniformity_p_values["z"].item())
    for values in p_values.values():
        rejected = (np.array(values) < 0.05).sum()
        assert stats.binomtest(int(rejected), 200, 0.05).pvalue > 1e-4
        assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("options", "failing", "passing", "word"),
    [
        ({"factor": 0.6}, "uniformity", "symmetry", "too narrow"),
        ({"factor": 1.8}, "uniformity", "symmetry", "too wide"),
        ({"shift": 0.3}, "symmetry", None, "is biased"),
    ],
)
def test_wrong_guides_fail(options, failing, passing, word):
    found = simulation_based_calibration(model, guides(**options), num_steps=0)
    p_values = {"symmetry": found.symmetry_p_values, "uniformity": found.uniformity_p_values}
    assert p_values[failing]["z"] < 1e-3
    if passing:
        assert p_values[passing]["z"] > 1e-3
    assert word in repr(found)
    assert found.probabilities["z"].shape == (200,)


@pytest.mark.long
@pytest.mark.parametrize("vectorize", [True, False])
def test_automatic_guides_are_fitted(vectorize):
    """The posterior is normal, hence within the family; the parameter store is left alone."""
    pyro.param("mine", torch.tensor(1.0))
    found = simulation_based_calibration(
        model,
        lambda model, data: AutoNormal(model),
        num_simulations=200 if vectorize else 10,
        num_samples=100,
        num_steps=800 if vectorize else 30,
        vectorize=vectorize,
    )
    assert list(pyro.get_param_store()) == ["mine"]
    if vectorize:
        assert found.symmetry_p_values["z"] > 1e-3
        assert found.uniformity_p_values["z"] > 1e-3


def test_event_dims_and_plates_of_latents():
    def local():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(3))

    found = simulation_based_calibration(
        local, lambda model, data: AutoNormal(model), num_simulations=20, num_steps=5
    )
    assert found.probabilities["z"].shape == (20, 6)
    assert found.symmetry_p_values["z"].shape == (6,)


def test_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = simulation_based_calibration(model, guides(), num_steps=0)
    (axis,) = found.plot()
    assert sum(patch.get_height() for patch in axis.patches[:10]) == 200
    plt.close("all")


def test_bad_input():
    with pytest.raises(ValueError, match="num_simulations must be at least 10, but it is 5"):
        simulation_based_calibration(model, guides(), num_simulations=5)

    def unobserved():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="the model has no observed site"):
        simulation_based_calibration(unobserved, guides(), num_steps=0)

    def lacks_plate(model, data):
        return lambda: pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"draws site 'z' with shape \(\), .* shape \(200, 1\)"):
        simulation_based_calibration(model, lacks_plate, num_steps=0)

    def other(model, data):
        return lambda: pyro.sample("y", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide does not draw site 'z'"):
        simulation_based_calibration(model, other, num_steps=0)


def test_discrete_latents_and_masked_ones():
    def coin():
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))
        with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def make_guide(model, data):
        def guide():
            with pyro.plate("simulations", 200, dim=-2):
                pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
                with pyro.plate("data", 3):
                    pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1.0, 9.0, 1.0])))

        return guide

    found = simulation_based_calibration(coin, make_guide, num_steps=0)
    assert found.symmetry_p_values["k"] > 1e-3
    assert found.uniformity_p_values["k"] > 1e-3
    assert found.probabilities["z"].shape == (200, 2)
    assert (found.uniformity_p_values["z"] > 1e-3).all()


def test_parameters_of_the_model_stay_as_they_are():
    pyro.param("sigma", torch.tensor(3.0))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self):
            sigma = pyro.param("sigma", torch.tensor(1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, sigma), obs=torch.tensor(0.0))

    seen = []

    def make_guide(model, data):
        seen.append(data["x"])
        return AutoNormal(model)

    module = Model()
    simulation_based_calibration(module, make_guide, num_steps=20)
    assert module.weight == 2
    assert pyro.param("sigma") == 3
    assert seen[0].std() == pytest.approx(13**0.5, rel=0.25)


def test_subsampled_plates_are_refused():
    def subsampled():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))

    with pytest.raises(ValueError, match=r"plate 'data' is subsampled \(2 of 10 rows\)"):
        simulation_based_calibration(subsampled, guides(), num_steps=0)


def test_factors_are_refused():
    def penalised():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -z.abs())
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match="factor 'penalty', so it cannot be simulated from"):
        simulation_based_calibration(penalised, guides(), num_steps=0)
