import pyro
import pytest
import torch

from pyro_ext.infer import ImportanceWeightedELBO, MultiSampleELBO
from tests.models import NormalNormal, TwoLayer
from tests.registry import ESTIMATORS
from tests.statistics import assert_mean


def gradients(elbo, programs, seed):
    """The gradient of every parameter, from one step with the noise of a seed."""
    pyro.set_rng_seed(seed)
    elbo.loss_and_grads(programs.model, programs.guide)
    store = pyro.get_param_store()
    found = {name: p.grad.clone() for name, p in store.named_parameters()}
    for _, p in store.named_parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_finite_differences_with_frozen_noise(make, smallest, vectorize, device):
    programs = TwoLayer(torch.randn(5, dtype=torch.float64, device=device))
    elbo = make(max(4, smallest), vectorize_particles=vectorize, max_plate_nesting=1)
    if elbo.guide_bound is not elbo:
        pytest.skip("its gradient is not that of its loss")
    found = gradients(elbo, programs, seed=1)
    assert set(found) == {"a", "w", "b", "scale"}

    def loss():
        pyro.set_rng_seed(1)
        return elbo.loss(programs.model, programs.guide)

    step = 1e-5
    for name, p in pyro.get_param_store().named_parameters():
        with torch.no_grad():
            p += step
            above = loss()
            p -= 2 * step
            below = loss()
            p += step
        assert found[name].item() == pytest.approx((above - below) / (2 * step), abs=1e-6), name


@pytest.mark.parametrize(("make", "smallest"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_closed_form_derivatives_equal_those_by_autograd(make, smallest, device):
    K = smallest + 3
    elbo = make(K)
    log_w = 2 * torch.randn(K, 3, 2, dtype=torch.float64, device=device)
    first, second = elbo.derivatives(log_w)
    assert first.shape == second.shape == log_w.shape
    torch.testing.assert_close(first.sum(0), torch.ones_like(first[0]))

    x = log_w.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(elbo.bound(x).sum(), x)
    torch.testing.assert_close(first, by_autograd)
    step = 1e-4
    for k in range(K):
        bump = torch.zeros_like(log_w)
        bump[k] = step
        above, _ = elbo.derivatives(log_w + bump)
        below, _ = elbo.derivatives(log_w - bump)
        difference = (above[k] - below[k]) / (2 * step)
        torch.testing.assert_close(second[k], difference, rtol=1e-6, atol=1e-6)


def test_default_derivatives_by_autograd():
    elbo = ImportanceWeightedELBO(4)
    log_w = torch.randn(4, 3, dtype=torch.float64)
    first, second = MultiSampleELBO.derivatives(elbo, log_w)
    expected_first, expected_second = elbo.derivatives(log_w)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(second, expected_second)

    class MeanELBO(MultiSampleELBO):
        def bound(self, log_w):
            return log_w.mean(0)

    first, second = MeanELBO(4).derivatives(log_w)
    assert (first == 0.25).all()
    assert (second == 0).all()


@pytest.mark.slow
def test_gradient_of_the_elbo_is_exact_in_expectation():
    """K = 1: the derivative of E log w in the location b of q(z | x) = N(b, 1.2)."""
    x = torch.tensor([0.7, -0.4], dtype=torch.float64)
    b = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Programs(NormalNormal):
        def guide(self):
            loc = pyro.param("b", b)
            with self.plate():
                pyro.sample("z", pyro.distributions.Normal(loc, 1.2))

    programs = Programs(x)
    elbo = ImportanceWeightedELBO(1)
    draws = [gradients(elbo, programs, seed)["b"] for seed in range(2000)]
    # d/db sum_n E[-z^2 / 2 - (x_n - z)^2 / 2] = sum_n (x_n - 2 b), and the loss is its negative.
    assert_mean(torch.stack(draws), -(x - 2 * 0.5).sum())
