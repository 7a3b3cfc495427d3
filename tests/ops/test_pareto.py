import math
import warnings

import pytest
import torch

from pyro_ext.ops import pareto_k


@pytest.fixture
def psislw():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    if not hasattr(arviz, "psislw"):
        pytest.skip("this ArviZ has no psislw")
    return arviz.psislw


@pytest.mark.parametrize("num_draws", [30, 100, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 800.0])
@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_arviz(psislw, num_draws, scale, ties):
    log_w = scale * torch.randn(num_draws, 5, dtype=torch.float64) - 100
    if ties:
        log_w = (log_w * 20).round() / 20
    _, expected = psislw(log_w.T.numpy().copy())
    found = pareto_k(log_w)
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pareto_k(log_w.T.float(), -1), found, rtol=1e-3, atol=1e-3)


def test_special_tails():
    assert pareto_k(torch.randn(20)) == math.inf  # a tail of four
    assert pareto_k(torch.zeros(1)) == math.inf
    assert pareto_k(torch.zeros(100)) == -math.inf  # an atom
    assert pareto_k(torch.full((100,), -math.inf)).isnan()
    few = torch.full((100,), -math.inf)
    few[:3] = torch.arange(3.0)
    assert pareto_k(few) == math.inf


@pytest.mark.parametrize("num_draws", [1100, 1200, 1500])
def test_a_tail_that_is_mostly_ties_at_the_maximum(num_draws):
    """There a point of the grid is the exponential distribution, with k = 0."""
    tail = math.ceil(3 * num_draws**0.5)
    log_w = torch.cat([torch.zeros(tail), torch.randn(num_draws - tail) - 5]).double()
    assert pareto_k(log_w).isfinite()
