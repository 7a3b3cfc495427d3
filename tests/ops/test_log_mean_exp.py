import math

import mpmath
import pytest
import torch

from pyro_ext.ops import leave_one_out_log_mean_exp, leave_one_out_mean, log_mean_exp

WEIGHTS = {
    "friendly": [0.3, -1.2, 0.7, 0.1],
    "one holds all": [700.0, -0.5, 0.2, 1.0],
    "spans 600 nats": [-300.0, 300.0, -100.0, 100.0],
    "ties at the top": [5.0, 5.0, 1.0, 5.0],
    "with zeros": [-math.inf, 0.0, -math.inf, 1.0],
    "two": [1e4, -1e4],
}


def exact_log_mean(values):
    with mpmath.workdps(700):
        total = mpmath.fsum(mpmath.exp(v) if v > -math.inf else 0 for v in values)
        return float(mpmath.log(total / len(values))) if total else -math.inf


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_match_a_reference_in_700_digits(weights, dtype, device):
    log_w = torch.tensor(weights, dtype=dtype, device=device)
    eps = torch.finfo(dtype).eps
    expected = torch.tensor(exact_log_mean(log_w.tolist()), dtype=dtype)
    torch.testing.assert_close(log_mean_exp(log_w).cpu(), expected, rtol=4 * eps, atol=4 * eps)

    leave_one_out = leave_one_out_log_mean_exp(log_w).tolist()
    for k in range(len(weights)):
        others = log_w.tolist()
        del others[k]
        assert leave_one_out[k] == pytest.approx(exact_log_mean(others), rel=4 * eps, abs=4 * eps)


def test_gradients_are_normalised_weights():
    log_w = torch.tensor([1000.0, 0.0, -math.inf], dtype=torch.float64, requires_grad=True)
    log_mean_exp(log_w).backward()
    assert log_w.grad.tolist() == [1.0, 0.0, 0.0]

    log_w = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(leave_one_out_log_mean_exp, log_w)


def test_leave_one_out_gradient_is_finite_beside_zeros_and_a_huge_weight():
    log_w = torch.tensor([800.0, 0.0, -math.inf, 1.0], dtype=torch.float64, requires_grad=True)
    leave_one_out_log_mean_exp(log_w).sum().backward()
    assert log_w.grad.isfinite().all()
    assert log_w.grad.sum() == pytest.approx(4.0, abs=1e-12)


@pytest.mark.parametrize("value", [512.0, -800.0])
def test_low_precision_weights_far_from_zero(value):
    log_w = torch.full((3,), value, dtype=torch.bfloat16)
    assert leave_one_out_log_mean_exp(log_w).tolist() == [value] * 3
    assert log_mean_exp(log_w) == value
    assert log_mean_exp(torch.ones(70_000, dtype=torch.float16)) == 1
    assert leave_one_out_log_mean_exp(torch.full((2,), 1e9)).tolist() == [1e9, 1e9]


def test_leave_one_out_mean_of_log_weights():
    log_w = torch.tensor([1.0, -math.inf, 4.0])
    assert leave_one_out_mean(log_w).tolist() == [-math.inf, 2.5, -math.inf]
    log_w = torch.randn(5, 3, dtype=torch.float64)
    for k in range(5):
        expected = torch.cat([log_w[:k], log_w[k + 1 :]]).mean(0)
        torch.testing.assert_close(leave_one_out_mean(log_w)[k], expected)
    with pytest.raises(ValueError, match=r"dim 0 .* at least 2 weights, but its size is 1"):
        leave_one_out_mean(torch.zeros(1))


def test_dims_are_counted_from_either_side():
    log_w = torch.randn(2, 6, 3)
    torch.testing.assert_close(log_mean_exp(log_w, 1), log_mean_exp(log_w, -2))
    torch.testing.assert_close(
        leave_one_out_log_mean_exp(log_w, 1),
        leave_one_out_log_mean_exp(log_w.movedim(1, 0)).movedim(0, 1),
    )


def test_too_few_weights_are_refused():
    with pytest.raises(ValueError, match="dim 0 of log_w is empty"):
        log_mean_exp(torch.empty(0))
    with pytest.raises(ValueError, match=r"dim 0 .* at least 2 weights, but its size is 1"):
        leave_one_out_log_mean_exp(torch.zeros(1))
