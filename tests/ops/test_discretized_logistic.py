import math
import subprocess
import sys

import mpmath
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.ops import bits_per_dim, discretized_logistic, discretized_logistic_mixture_log_prob

F64 = {"dtype": torch.float64}
RANGES = {"0..255": (0, 255), "0..16": (0, 16), "-128..127": (-128, 127), "0..65535": (0, 65535)}


def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def exact(x, logits, loc, log_scale, low, high):
    """log p, the terms of its gradients, and shares and weights of the components."""
    masses, by_loc, by_log_scale = [], [], []
    half = mpmath.mpf(1) / 2
    for m, log_s in zip(map(mpmath.mpf, loc), map(mpmath.mpf, log_scale), strict=True):
        t = mpmath.exp(-log_s)
        a, b = (x + half - m) * t, (x - half - m) * t
        upper = sigmoid(-a) if x < high else 0
        lower = sigmoid(b) if x > low else 0
        if low < x < high:
            masses.append(sigmoid(a) * sigmoid(-b) * -mpmath.expm1(-t))
            inside = t / mpmath.expm1(t)
        else:
            masses.append(sigmoid(a) if x == low else sigmoid(-b))
            inside = 0
        by_loc.append((lower - upper) * t)
        by_log_scale.append(b * lower - a * upper - inside)
    weights = [mpmath.exp(mpmath.mpf(x)) for x in logits]
    weights = [w / sum(weights) for w in weights]
    total = sum(w * m for w, m in zip(weights, masses, strict=True))
    shares = [w * m / total for w, m in zip(weights, masses, strict=True)]
    terms = [[r * d for r, d in zip(shares, by, strict=True)] for by in (by_loc, by_log_scale)]
    by_logits = [r - w for r, w in zip(shares, weights, strict=True)]
    return mpmath.log(total), (by_logits, *terms), max(*shares, *weights)


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("low", "high"), RANGES.values(), ids=RANGES)
def test_float32_against_sixty_digits(low, high, K):
    """Locations up to 1e5, log scales from -12 to 12, edges included."""
    N = 150
    x = torch.randint(low, high + 1, (N,))
    x[:20], x[20:40] = low, high
    near = x[:, None] + torch.randn(N, K) * 10 ** (4 * torch.rand(N, K) - 3)
    far = 1e5 * (2 * torch.rand(N, K) - 1)
    parameters = (
        3 * torch.randn(N, K),
        torch.where(torch.rand(N, K) < 0.6, near, far),
        24 * torch.rand(N, K) - 12,
    )
    logits, loc, log_scale = (p.requires_grad_() for p in parameters)
    log_prob = discretized_logistic_mixture_log_prob(
        x[:, None], logits, loc[:, None], log_scale[:, None], low, high
    )
    found = torch.autograd.grad(log_prob.sum(), parameters)
    assert all(tensor.isfinite().all() for tensor in (log_prob, *found))
    # The product of a tail that is denormal in float32 and 1 / scale.
    tiny = mpmath.mpf("1e-30")
    with mpmath.workdps(60):
        for n in range(N):
            row = [p[n].tolist() for p in parameters]
            value, gradients, largest_weight = exact(x[n].item(), *row, low, high)
            difference = abs(log_prob[n].item() - value)
            assert difference <= 5e-6 * max(abs(value), mpmath.mpf("1e-6"))
            floors = (largest_weight, tiny, tiny)
            for one, expected, floor in zip(found, gradients, floors, strict=True):
                bound = 2e-5 * max(floor, *map(abs, expected))
                for k in range(K):
                    assert abs(one[n, k].item() - expected[k]) <= bound


def small_parameters(N=6, C=2, K=3, **options):
    return (
        torch.randn(N, K, **options),
        5 * torch.randn(N, C, K, **options) + 8,
        torch.randn(N, C, K, **options),
    )


def values(N=6, C=2):
    return torch.randint(0, 17, (N, C))


def log_prob_of(value, *parameters):
    return discretized_logistic_mixture_log_prob(value, *parameters, low=0, high=16)


def test_blocks_are_the_same(monkeypatch):
    value = values(101, 3)
    parameters = [p.requires_grad_() for p in small_parameters(101, 3, 4)]
    found = []
    for size in (2**17, 60):
        monkeypatch.setattr(discretized_logistic, "BLOCK_SIZE", size)
        log_prob = log_prob_of(value, *parameters)
        found.append((log_prob, *torch.autograd.grad(log_prob.sum(), parameters)))
        with torch.no_grad():
            torch.testing.assert_close(log_prob_of(value, *parameters), log_prob)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_parameters_and_values_broadcast():
    logits, loc, log_scale = (p.requires_grad_() for p in small_parameters(**F64))
    value = torch.randint(0, 17, (4, 6, 2))
    whole = log_prob_of(value, logits, loc, log_scale[0])
    assert whole.shape == (4, 6)
    rows = torch.stack([log_prob_of(v, logits, loc, log_scale[0]) for v in value])
    torch.testing.assert_close(whole, rows)
    for p in (logits, loc, log_scale):
        (one,) = torch.autograd.grad(whole.sum(), p, retain_graph=True)
        (other,) = torch.autograd.grad(rows.sum(), p, retain_graph=True)
        torch.testing.assert_close(one, other)


def test_outside_of_the_range_nan_and_nothing():
    parameters = small_parameters()
    assert (log_prob_of(values() * 0 + 17, *parameters) == -math.inf).all()
    assert (log_prob_of(values() * 0 - 1, *parameters) == -math.inf).all()
    assert log_prob_of(values() * math.nan, *parameters).isnan().all()
    empty = [p.requires_grad_() for p in small_parameters(0)]
    log_prob = log_prob_of(values(0), *empty)
    assert log_prob.shape == (0,)
    log_prob.sum().backward()


def test_function_transforms_agree_with_autograd():
    value, parameters = values(), small_parameters(**F64)
    expected = log_prob_of(value, *parameters)
    torch.testing.assert_close(torch.func.vmap(log_prob_of)(value, *parameters), expected)
    last = tuple(p.movedim(0, -1) for p in parameters)
    found = torch.func.vmap(log_prob_of, in_dims=(None, -1, -1, -1))(value[0], *last)
    torch.testing.assert_close(found, log_prob_of(value[:1], *parameters))

    leaves = [p.clone().requires_grad_() for p in parameters]
    gradients = torch.autograd.grad(log_prob_of(value, *leaves).sum(), leaves)
    per_row = torch.func.vmap(torch.func.grad(log_prob_of, argnums=(1, 2, 3)))
    for one, other in zip(per_row(value, *parameters), gradients, strict=True):
        torch.testing.assert_close(one, other)


def step(value, *parameters):
    loss = log_prob_of(value, *parameters).sum()
    return loss, *torch.autograd.grad(loss, parameters)


def test_captured_as_a_graph():
    value, parameters = values(), [p.requires_grad_() for p in small_parameters()]
    graph = make_fx(step)(value, *parameters)
    other = [p.detach().flip(0).requires_grad_() for p in parameters]
    for one, expected in zip(graph(value, *other), step(value, *other), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.long
def test_compiled_without_breaks():
    # In a process of its own: the checks of shapes around each function are not to be compiled.
    call = "from tests.ops.test_discretized_logistic import compile_it; compile_it()"
    subprocess.run([sys.executable, "-c", call], check=True)


def compile_it():
    value, parameters = values(), [p.requires_grad_() for p in small_parameters()]
    compiled = torch.compile(log_prob_of, fullgraph=True, backend="aot_eager")
    log_prob = compiled(value, *parameters)
    found = torch.autograd.grad(log_prob.sum(), parameters)
    loss, *expected = step(value, *parameters)
    torch.testing.assert_close(log_prob.sum(), loss)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused():
    value, parameters = values(), [p.requires_grad_() for p in small_parameters()]
    log_prob = log_prob_of(value, *parameters)
    (first,) = torch.autograd.grad(log_prob.sum(), parameters[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="log_prob can only be differentiated once"):
        torch.autograd.grad(first.sum(), parameters[1])


def test_shapes_are_checked():
    with pytest.raises(
        ValueError, match=r"Pass value of shape \(..., C\), logits of shape \(..., K\)"
    ):
        log_prob_of(values(), torch.zeros(3), torch.zeros(3), torch.zeros(3))
    logits, loc, log_scale = small_parameters()
    with pytest.raises(ValueError, match=r"value \(6, 2\), logits \(6, 2\), loc \(6, 2, 3\)"):
        log_prob_of(values(), logits[:, :2], loc, log_scale)
    with pytest.raises(ValueError, match="low=3 is above high=2"):
        discretized_logistic_mixture_log_prob(values(), logits, loc, log_scale, low=3, high=2)


def test_bits_per_dim():
    log_prob = torch.tensor([-14166.0])
    assert bits_per_dim(log_prob, 3072).item() == pytest.approx(6.6528, abs=1e-4)
    assert bits_per_dim(-math.log(2), 1) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="num_dims must be at least 1, but it is 0"):
        bits_per_dim(log_prob, 0)
