"""The pass for values that share their components, against the plain formula and 60 digits."""

import math
import subprocess
import sys

import mpmath
import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ext.ops import normal_scale_mixture_log_densities, normal_scale_mixture_log_prob

F64 = {"dtype": torch.float64}

#: name -> (scales, weights)
COMPONENTS = {
    "one": ([0.7], [1.0]),
    "the paper's": ([1.0, 0.0025], [0.25, 0.75]),
    "narrow first": ([0.0025, 1.0], [0.25, 0.75]),
    "equal": ([0.5, 0.5, 0.5], [0.2, 0.3, 0.5]),
    "ratio of 1e12": ([1e-6, 1e6, 1.0], [1.0, 1e-30, 1e-15]),
    "wide one without weight": ([100.0, 1.0, 0.1], [0.0, 0.5, 0.5]),
}


def parameters(name):
    scales, weights = (torch.tensor(x, **F64) for x in COMPONENTS[name])
    return scales, (weights / weights.sum()).log()


def values():
    x = torch.logspace(-10, 10, 41)
    return torch.cat([-x, torch.zeros(1), x]).requires_grad_()


@pytest.mark.parametrize("name", COMPONENTS)
def test_float32_against_sixty_digits(name):
    x = values()
    scales, log_weights = parameters(name)
    log_prob = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float32)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    total = sum(COMPONENTS[name][1])
    num_compared = 0
    with mpmath.workdps(60):
        for n, value in enumerate(x.tolist()):
            value = mpmath.mpf(value)
            terms = [
                (mpmath.mpf(w) / total * mpmath.npdf(value / mpmath.mpf(s)) / mpmath.mpf(s), s)
                for s, w in zip(*COMPONENTS[name], strict=True)
            ]
            density = sum(d for d, _ in terms)
            exact = mpmath.log(density)
            if exact < -1e38:
                continue  # no float32
            num_compared += 1
            slopes = [-d / density * value / mpmath.mpf(s) ** 2 for d, s in terms]
            assert abs(log_prob[n].item() - exact) <= 5e-6 * max(abs(exact), mpmath.mpf("1e-6"))
            error = abs(gradient[n].item() - sum(slopes))
            assert error <= 2e-5 * max(map(abs, slopes)) + mpmath.mpf("1e-37")
    assert num_compared > 40


@pytest.mark.parametrize("name", COMPONENTS)
def test_equals_the_plain_formula_at_every_order(name):
    x = torch.linspace(-3, 3, 13, **F64).requires_grad_()
    scales, log_weights = parameters(name)
    shared = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float64)
    plain = normal_scale_mixture_log_densities(x, scales, log_weights).logsumexp(-1)
    for _ in range(3):
        torch.testing.assert_close(shared, plain, rtol=1e-10, atol=1e-10 * plain.abs().max().item())
        (shared,) = torch.autograd.grad(shared.sum(), x, create_graph=True)
        (plain,) = torch.autograd.grad(plain.sum(), x, create_graph=True)


def test_blocks_join(monkeypatch):
    scales, log_weights = parameters("the paper's")
    x = torch.randn(7, 11, requires_grad=True)
    results = []
    for size in (2**17, 5):
        monkeypatch.setattr("pyro_ext.ops.normal_scale_mixture.BLOCK_SIZE", size)
        log_prob = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float32)
        results.append((log_prob, *torch.autograd.grad(log_prob.square().sum(), x)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_infinite_missing_and_no_values():
    scales, log_weights = parameters("the paper's")
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    log_prob = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float32)
    assert log_prob[:2].tolist() == [-math.inf, -math.inf]
    assert log_prob.isnan().tolist() == [False, False, True, False]
    empty = normal_scale_mixture_log_prob(torch.zeros(0, 3), scales, log_weights, torch.float32)
    assert empty.shape == (0, 3)


def test_half_precision_does_not_overflow_before_a_small_gradient():
    scales, log_weights = torch.tensor([2.5e-3], **F64), torch.zeros(1, **F64)
    x = torch.tensor([0.5], dtype=torch.float16, requires_grad=True)
    log_prob = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float32)
    (gradient,) = torch.autograd.grad(1e-3 * log_prob.sum(), x)
    assert gradient.item() == pytest.approx(-80, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode():
    scales, log_weights = parameters("the paper's")
    x = torch.linspace(-1, 1, 5, **F64)

    def log_prob(x):
        return normal_scale_mixture_log_prob(x, scales, log_weights, torch.float64)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        forward = forward_ad.unpack_dual(log_prob(dual)).tangent
    x.requires_grad_()
    torch.testing.assert_close(forward, *torch.autograd.grad(log_prob(x).sum(), x))


def test_learnt_components_have_gradients():
    scales, log_weights = parameters("the paper's")
    scales.requires_grad_()
    x = torch.linspace(-1, 1, 5, **F64)
    assert torch.autograd.gradcheck(
        lambda s: normal_scale_mixture_log_prob(x, s, log_weights, torch.float64), scales
    )


def learnt_step(x, scales, log_weights):
    log_prob = normal_scale_mixture_log_prob(x, scales, log_weights, torch.float64)
    return log_prob, *torch.autograd.grad(log_prob.sum(), (x, scales, log_weights))


def learnt_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, scales, log_weights = (
        torch.randn(shape, generator=generator, **F64) for shape in ((5,), (5, 3), (5, 3))
    )
    return [t.requires_grad_() for t in (x, scales.exp(), log_weights.log_softmax(-1))]


def test_learnt_components_are_captured_as_a_graph():
    graph = make_fx(learnt_step)(*learnt_inputs())
    other = learnt_inputs(1)
    for one, expected in zip(graph(*other), learnt_step(*other), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.long
def test_learnt_components_are_compiled_without_breaks():
    call = "from tests.ops.test_normal_scale_mixture import compile_it; compile_it()"
    subprocess.run([sys.executable, "-c", call], check=True)


def compile_it():
    inputs = learnt_inputs()
    compiled = torch.compile(
        lambda *tensors: normal_scale_mixture_log_prob(*tensors, torch.float64),
        fullgraph=True,
        backend="aot_eager",
    )
    log_prob = compiled(*inputs)
    found = log_prob, *torch.autograd.grad(log_prob.sum(), inputs)
    for one, expected in zip(found, learnt_step(*inputs), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_forward_mode_and_second_derivatives_of_learnt_components():
    inputs = tuple(t.detach() for t in learnt_inputs())

    def total(*tensors):
        return normal_scale_mixture_log_prob(*tensors, torch.float64).sum()

    arguments = (0, 1, 2)
    backward = torch.func.jacrev(torch.func.grad(total, arguments), arguments)(*inputs)
    forward = torch.func.jacfwd(torch.func.grad(total, arguments), arguments)(*inputs)
    torch.testing.assert_close(forward, backward)
    leaves = [t.requires_grad_() for t in learnt_inputs()]
    assert torch.autograd.gradgradcheck(total, leaves)
