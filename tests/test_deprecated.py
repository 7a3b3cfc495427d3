"""Old spellings work for one more release, warn, and name the new one."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ext import ops
from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo
from pyro_ext.diagnostics.arviz_adapter import group
from pyro_ext.infer import (
    ImportanceWeightedELBO,
    MultiSampleELBO,
    estimate_evidence,
    gradient_diagnostics,
)
from tests.models import GlobalNormal

X = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
LOG_W = torch.tensor([0.3, -1.0, 2.0])


@pytest.mark.filterwarnings("ignore:loo. Pareto k")
@pytest.mark.parametrize("function", [diagnose, from_pyro_svi, loo])
def test_pairs_and_old_names_of_arguments(function):
    programs = GlobalNormal(X)
    pair = programs.model, programs.guide
    with pytest.warns(DeprecationWarning, match=r"tuple is deprecated\. Pass model and guide"):
        function(pair, num_samples=10)
    with pytest.warns(DeprecationWarning, match=r"batch_size= is deprecated\. Pass chunk_size="):
        function(*pair, num_samples=10, batch_size=5)
    with (
        pytest.warns(DeprecationWarning, match="tuple is deprecated"),
        pytest.warns(DeprecationWarning, match=r"svi= is deprecated\. Pass model="),
    ):
        function(svi=pair, num_samples=10)
    with (
        pytest.warns(DeprecationWarning, match="batch_size="),
        pytest.raises(TypeError, match="batch_size= is the old name of chunk_size="),
    ):
        function(*pair, num_samples=10, batch_size=5, chunk_size=5)


def test_pairs_in_a_list_are_chains():
    programs = GlobalNormal(X)
    found = from_pyro_svi([(programs.model, programs.guide)] * 2, num_samples=10)
    assert group(found, "posterior")["z"].shape == (2, 10)


def test_axes_of_plots():
    plt = pytest.importorskip("matplotlib.pyplot")

    def model():
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("b", torch.tensor(0.5)), 0.8))

    evidence = estimate_evidence(model, guide, num_samples=50)
    gradients = gradient_diagnostics(
        model, guide, elbos={"K = 2": ImportanceWeightedELBO(2)}, num_repeats=9
    )
    for draw in (evidence.plot, evidence.plot_pareto_k, gradients.plot):
        ax = plt.figure().subplots()
        assert draw(ax=ax) is ax
        with pytest.warns(DeprecationWarning, match=r"axes= is deprecated\. Pass ax= instead"):
            assert draw(axes=ax) is ax
        plt.close("all")


def test_a_bound_that_defines_the_old_methods():
    with (
        pytest.warns(DeprecationWarning, match=r"Old\.first_and_second .* Define derivatives"),
        pytest.warns(DeprecationWarning, match=r"Old\.signal .* Define learning_signal"),
    ):

        class Old(ImportanceWeightedELBO):
            def first_and_second(self, log_w):
                first, second = super().first_and_second(log_w)
                return 2 * first, second

            def signal(self, log_w):
                return 3 * super().signal(log_w)

    new = ImportanceWeightedELBO(3)
    with pytest.warns(DeprecationWarning, match=r"first_and_second is deprecated\. Call deriv"):
        first, second = Old(3).derivatives(LOG_W)
    torch.testing.assert_close(first, 2 * new.derivatives(LOG_W)[0])
    torch.testing.assert_close(second, new.derivatives(LOG_W)[1])
    with pytest.warns(DeprecationWarning, match=r"signal is deprecated\. Call learning_signal"):
        signal = Old(3).learning_signal(LOG_W)
    torch.testing.assert_close(signal, 3 * new.learning_signal(LOG_W))


def test_the_old_methods_of_a_new_bound():
    class Mean(MultiSampleELBO):
        def bound(self, log_w):
            return log_w.mean(0)

    with pytest.warns(DeprecationWarning, match=r"MultiSampleELBO\.first_and_second"):
        first, _ = Mean(3).first_and_second(LOG_W)
    torch.testing.assert_close(first, torch.full((3,), 1 / 3))
    with pytest.warns(DeprecationWarning, match=r"ImportanceWeightedELBO\.signal"):
        signal = ImportanceWeightedELBO(3).signal(LOG_W)
    torch.testing.assert_close(signal, ImportanceWeightedELBO(3).learning_signal(LOG_W))


def test_the_derivatives_of_the_jackknife():
    with pytest.warns(DeprecationWarning, match="jackknife_derivatives"):
        old = ops.jackknife_first_and_second
    assert old is ops.jackknife_derivatives
    with pytest.raises(AttributeError, match="no attribute 'jackknife_of_all_trades'"):
        _ = ops.jackknife_of_all_trades
