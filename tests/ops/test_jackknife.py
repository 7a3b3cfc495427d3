import itertools
import math

import mpmath
import pytest
import torch

from pyro_ext.ops import (
    MAX_SUBSETS,
    TooManySubsetsError,
    jackknife,
    jackknife_coefficients,
    jackknife_derivatives,
    log_mean_exp,
)
from tests.statistics import assert_mean


def exact_coefficient(K, m, j):
    return mpmath.mpf((-1) ** j * (K - j) ** m) / mpmath.factorial(m - j) / mpmath.factorial(j)


def exact_jackknife(log_w, order):
    """Value and both derivatives by enumeration, in 400 digits."""
    with mpmath.workdps(400):
        w = [mpmath.exp(x) if x > -math.inf else mpmath.mpf(0) for x in log_w]
        K = len(w)
        value, first, second = mpmath.mpf(0), [mpmath.mpf(0)] * K, [mpmath.mpf(0)] * K
        for j in range(order + 1):
            c = exact_coefficient(K, order, j) / math.comb(K, j)
            total = mpmath.fsum(w)
            for subset in itertools.combinations(range(K), j):
                rest = total - mpmath.fsum(w[i] for i in subset)
                value += c * mpmath.log(rest / (K - j))
                if K <= 20:
                    for i in set(range(K)).difference(subset):
                        first[i] += c * w[i] / rest
                        second[i] += c * w[i] / rest * (1 - w[i] / rest)
        return float(value), [float(x) for x in first], [float(x) for x in second]


def weights(K):
    generator = torch.Generator().manual_seed(K)
    normal = torch.randn(K, generator=generator, dtype=torch.float64)
    one_holds_all = normal.clone()
    one_holds_all[K // 2] = 700.0
    zeros = normal.clone()
    zeros[: K // 3] = -math.inf
    return {
        "friendly": normal,
        "far from zero": 3 * normal - 1e4,
        "heavy tail": 30 * normal,
        "spans 600 nats": torch.linspace(-300, 300, K, dtype=torch.float64),
        "one holds all": one_holds_all,
        "all equal": torch.zeros(K, dtype=torch.float64),
        "a third are zero": zeros,
    }


CASES = [
    pytest.param(log_w, order, id=f"K={K}, order {order}, {name}")
    for K, order in [(1, 0), (2, 1), (5, 1), (5, 4), (8, 3), (9, 5), (20, 2)]
    for name, log_w in weights(K).items()
    if log_w.isfinite().sum() > order
]


@pytest.mark.long
@pytest.mark.parametrize(("log_w", "order"), CASES)
def test_value_and_derivatives_match_enumeration_in_400_digits(log_w, order, device):
    value, first, second = exact_jackknife(log_w.tolist(), order)
    log_w = log_w.to(device).requires_grad_()
    found = jackknife(log_w, order)
    assert found.item() == pytest.approx(value, rel=1e-10, abs=1e-10)

    (gradient,) = torch.autograd.grad(found, log_w)
    found_first, found_second = jackknife_derivatives(log_w, order)
    scale = max(map(abs, first))
    assert gradient.tolist() == pytest.approx(first, abs=1e-10 * scale)
    assert found_first.tolist() == pytest.approx(first, abs=1e-10 * scale)
    assert found_second.tolist() == pytest.approx(second, abs=1e-10 * scale)
    assert gradient.sum().item() == pytest.approx(1.0, abs=1e-11 * max(1, scale))


@pytest.mark.sampled
@pytest.mark.long
@pytest.mark.parametrize("name", weights(3))
@pytest.mark.parametrize(
    ("K", "order"), [(5000, 1), (96, 2), pytest.param(256, 2, marks=pytest.mark.slow)]
)
def test_many_particles(name, K, order, device):
    log_w = weights(K)[name].to(device)
    value, _, _ = exact_jackknife(log_w.tolist(), order)
    assert jackknife(log_w, order).item() == pytest.approx(value, rel=1e-9)

    single = log_w.float().requires_grad_()
    value, _, _ = exact_jackknife(single.tolist(), order)
    found = jackknife(single, order)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(value, rel=2e-7)
    found.backward()
    # Each of the K entries is rounded to float32 once.
    rounding = torch.finfo(torch.float32).eps * single.grad.abs().sum().item()
    assert single.grad.double().sum().item() == pytest.approx(1.0, abs=rounding)


def test_memory_does_not_grow_with_subsets_times_particles():
    class Peak(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
            return out

    K = 256
    with Peak() as peak:
        jackknife(torch.zeros(K, 100), 2)
    assert peak.numel <= 2 * 2**20
    assert peak.numel < math.comb(K, 2) * K


def test_batch_dims_are_independent(device):
    log_w = torch.randn(7, 3, 2, dtype=torch.float64, device=device)
    batched = jackknife(log_w, 2)
    first, second = jackknife_derivatives(log_w, 2)
    assert batched.shape == (3, 2)
    assert first.shape == second.shape == log_w.shape
    for i, j in itertools.product(range(3), range(2)):
        torch.testing.assert_close(batched[i, j], jackknife(log_w[:, i, j], 2))
    assert jackknife(torch.zeros(4, 0), 1).shape == (0,)
    assert torch.autograd.gradcheck(lambda x: jackknife(x, 2), log_w.requires_grad_())


def test_order_zero_is_the_log_mean_weight():
    log_w = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(jackknife(log_w, 0), log_mean_exp(log_w))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_nan_with_fewer_than_order_plus_one_finite_weights(order):
    K = 6
    for num_finite in range(K + 1):
        log_w = torch.full((K,), -math.inf, dtype=torch.float64)
        log_w[K - num_finite :] = torch.arange(num_finite)
        log_w.requires_grad_()
        value = jackknife(log_w, order)
        (gradient,) = torch.autograd.grad(value, log_w)
        assert value.isnan() == (num_finite < order + 1)
        assert gradient.isnan().any() == (num_finite < order + 1)


def test_nan_weight_gives_nan():
    assert jackknife(torch.tensor([0.0, math.nan, 1.0]), 1).isnan()


@pytest.mark.parametrize(("K", "order"), [(2, 1), (32, 3), (256, 2), (5000, 1)])
def test_coefficients(K, order):
    found = jackknife_coefficients(K, order)
    with mpmath.workdps(50):
        exact = [exact_coefficient(K, order, j) for j in range(order + 1)]
        assert found == [float(c) for c in exact]
        assert mpmath.fsum(exact) == pytest.approx(1)


def exact_bias_for_gamma_weights(K, order, a):
    """E of the jackknife minus log a, for Gamma(a, 1) weights; E of the log mean of K is
    digamma(K a) - log K."""
    with mpmath.workdps(60):
        a = mpmath.mpf(str(a))
        return sum(
            exact_coefficient(K, order, j) * (mpmath.digamma((K - j) * a) - mpmath.log(K - j))
            for j in range(order + 1)
        ) - mpmath.log(a)


@pytest.mark.long
@pytest.mark.parametrize("num_draws", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("a", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("K", [4, 8, 16, 32])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_bias_under_gamma_weights_matches_the_closed_form(order, K, a, num_draws):
    gamma = torch.distributions.Gamma(torch.tensor(a, dtype=torch.float64), 1.0)
    draws = [jackknife(gamma.sample((K, 500)).log(), order) for _ in range(num_draws // 500)]
    bias = float(exact_bias_for_gamma_weights(K, order, a))
    assert_mean(torch.cat(draws) - math.log(a), bias)


@pytest.mark.parametrize(("order", "slope"), [(0, -1), (1, -2), (2, -4), (3, -4)])
def test_bias_falls_with_the_slope_of_the_series_without_a_cubic_term(order, slope):
    small, large = (abs(exact_bias_for_gamma_weights(K, order, 1)) for K in (2000, 4000))
    assert float(mpmath.log(large / small, 2)) == pytest.approx(slope, abs=0.01)


ERRORS = {
    "order >= K": (
        lambda: jackknife(torch.zeros(3), 3),
        ValueError,
        "less than num_particles=3, but it is 3",
    ),
    "negative order": (lambda: jackknife(torch.zeros(3), -1), ValueError, "at least 0 .* is -1"),
    "no dims": (lambda: jackknife(torch.tensor(0.0)), ValueError, r"shape \(K, ...\)"),
    "integers": (lambda: jackknife(torch.zeros(3, dtype=torch.long)), ValueError, "torch.int64"),
    "C(50, 10)": (lambda: jackknife(torch.zeros(50), 10), TooManySubsetsError, "10272278170"),
    "middle of the row": (lambda: jackknife(torch.zeros(30), 29), TooManySubsetsError, "155117520"),
    "twice": (
        lambda: torch.autograd.grad(
            torch.autograd.grad(
                jackknife(x := torch.zeros(3, requires_grad=True)), x, create_graph=True
            )[0].sum(),
            x,
        ),
        NotImplementedError,
        "only be differentiated once",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_stated_number_of_subsets_is_reached():
    assert math.comb(2048, 2) <= MAX_SUBSETS
    assert jackknife(torch.zeros(2048), 2).item() == pytest.approx(0, abs=1e-6)
