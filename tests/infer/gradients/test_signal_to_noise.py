import math

import matplotlib as mpl
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.infer import ImportanceWeightedELBO, gradient_diagnostics
from pyro_ext.infer.gradients.signal_to_noise import GradientSummary

mpl.use("Agg")
X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model():
    a = pyro.param("a", X.new_tensor(0.3))
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X)


def guide():
    b = pyro.param("b", X.new_tensor(0.3))
    scale = pyro.param("scale", X.new_tensor(0.9), constraint=dist.constraints.positive)
    with pyro.plate("data", len(X)):
        pyro.sample("z", dist.Normal(b * X, scale))


ELBOS = {
    "plain": ImportanceWeightedELBO(1, max_plate_nesting=1),
    "pyro": Trace_ELBO(),
    "dreg": ImportanceWeightedELBO(8, gradient="dreg", max_plate_nesting=1),
    "chunks": ImportanceWeightedELBO(8, particle_chunk_size=4, max_plate_nesting=1),
}


@pytest.mark.long
def test_mean_and_deviation_match_their_closed_form():
    """K = 1: d loss / d a = -sum_n (z_n - a), with z_n ~ N(b x_n, 0.9)."""
    found = gradient_diagnostics(model, guide, elbos=ELBOS, num_repeats=150)
    mean = (X.sum() * 0.3 - 3 * 0.3).abs().item()
    std = math.sqrt(3) * 0.9
    for name in ("plain", "pyro"):
        summary = found.model[name]
        assert summary.mean == pytest.approx(mean, abs=4.5 * std / 150**0.5)
        assert summary.std == pytest.approx(std, rel=4.5 / 300**0.5)
        assert summary.signal_to_noise == pytest.approx(summary.mean / summary.std)
    assert found.guide["dreg"].std < found.guide["chunks"].std
    assert all(seconds > 0 for seconds in found.seconds.values())
    for word in ("plain", "pyro", "dreg", "chunks", "SNR", "ms"):
        assert word in repr(found)
    assert len(found.plot().patches) == 2 * len(ELBOS)


def test_parameters_and_gradients_are_left_alone(capsys):
    a = pyro.param("a", X.new_tensor(0.3))
    a.grad = X.new_tensor(5.0)
    gradient_diagnostics(model, guide, elbos=ELBOS, num_repeats=2, progress_bar=True)
    assert a.item() == 0.3
    assert a.grad.item() == 5.0
    assert dict(pyro.get_param_store().named_parameters())["b"].grad is None
    assert "gradients: 100%" in capsys.readouterr().err


def test_a_program_without_parameters_has_no_gradient():
    def fixed_guide():
        with pyro.plate("data", len(X)):
            pyro.sample("z", dist.Normal(X, 1.0))

    found = gradient_diagnostics(model, fixed_guide, elbos=ELBOS, num_repeats=3)
    assert found.guide["plain"].std == 0
    assert math.isnan(found.guide["plain"].signal_to_noise)
    assert GradientSummary(1.0, 0.0).signal_to_noise == math.inf


def test_errors():
    with pytest.raises(ValueError, match="num_repeats must be at least 2, but it is 1"):
        gradient_diagnostics(model, guide, elbos=ELBOS, num_repeats=1)
    with pytest.raises(ValueError, match=r"elbos is empty\. Pass at least one estimator"):
        gradient_diagnostics(model, guide, elbos={})

    def empty():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="model and guide have no parameters"):
        gradient_diagnostics(empty, empty, elbos=ELBOS)
