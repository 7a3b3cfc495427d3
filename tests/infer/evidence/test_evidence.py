"""What an Evidence prints, converts to and draws."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext.infer import estimate_evidence
from tests.models import GlobalNormal, NormalNormal

X = torch.tensor([0.3, -1.9, 2.4, -0.2], dtype=torch.float64)


def evidence(**options):
    programs = NormalNormal(X)
    options = {"num_samples": 300, "jackknife_orders": (1, 2), **options}
    return estimate_evidence(programs.model, programs.guide, max_plate_nesting=1, **options)


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [1, 7, 300])
def test_history_holds_the_first_draws(chunk_size):
    torch.manual_seed(0)
    found = evidence(chunk_size=chunk_size)
    assert found.history.num_samples == (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    torch.testing.assert_close(found.history.log_evidence[-1], found.log_evidence)
    assert found.history.std_error[0].isnan().all()
    assert found.history.jackknife[2][:2].isnan().all()
    assert found.history.jackknife[2][2:].isfinite().all()
    if chunk_size == 1:
        torch.manual_seed(0)
        fewer = evidence(chunk_size=1, num_samples=64)
        torch.testing.assert_close(found.history.log_evidence[6], fewer.log_evidence)
        torch.testing.assert_close(found.history.jackknife[1][6], fewer.jackknife[1])


def test_dataset():
    found = evidence()
    dataset = found.to_dataset()
    assert dataset["log_evidence"].dims == ("data",)
    assert dataset["jackknife"].dims == ("order", "data")
    assert dataset["history_jackknife"].dims == ("order", "num_samples", "data")
    assert dataset["order"].values.tolist() == [1, 2]
    assert dataset["num_samples"].values.tolist() == list(found.history.num_samples)
    assert dataset.attrs["total"] == found.total
    second = dataset["jackknife"].sel(order=2).values
    torch.testing.assert_close(torch.tensor(second), found.jackknife[2])
    at_64 = dataset["history_log_evidence"].sel(num_samples=64).values
    torch.testing.assert_close(torch.tensor(at_64), found.history.log_evidence[6])
    assert "order" not in evidence(jackknife_orders=()).to_dataset().dims

    programs = GlobalNormal(X)
    with pytest.warns(UserWarning, match="one weight for the whole plate"):
        joint = estimate_evidence(programs.model, programs.guide, num_samples=30)
    assert joint.to_dataset()["log_evidence"].dims == ()


def test_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = evidence()
    axes = found.plot()
    first, *orders = axes.get_lines()
    assert first.get_xdata().tolist() == list(found.history.num_samples)
    assert first.get_ydata()[-1] == pytest.approx(found.log_evidence.mean().item())
    labels = [line.get_label() for line in orders]
    assert labels == ["jackknife 1", "jackknife 2"]
    (band,) = axes.collections
    half = 2 * found.total_std_error / 4
    edges = band.get_paths()[0].vertices
    at_end = edges[edges[:, 0] == 300, 1]
    assert at_end.max() - at_end.min() == pytest.approx(2 * half)

    _, own = plt.subplots()
    assert found.plot_pareto_k(own) is own
    points = torch.tensor(own.collections[0].get_offsets().tolist())
    assert len(points) == (found.pareto_k <= 0.7).sum()
    few = evidence(num_samples=20)
    assert few.plot_pareto_k().get_title() == "needs 21 draws"
    plt.close("all")


def test_plates_with_the_names_of_other_dims():
    def model():
        with pyro.plate("order", 3, dim=-1), pyro.plate("num_samples", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 3))

    dataset = estimate_evidence(model, num_samples=50).to_dataset()
    assert dataset["log_evidence"].dims == ("num_samples_plate", "order_plate")


def test_bits_per_dim_and_its_error():
    found = evidence()
    bits = found.bits_per_dim(10)
    torch.testing.assert_close(bits * -10 * math.log(2), found.log_evidence)
    errors = found.bits_per_dim_std_error(10)
    torch.testing.assert_close(errors * 10 * math.log(2), found.std_error)
    assert f"total          {found.total:.4f} +- {found.total_std_error:.4f} nats" in repr(found)
