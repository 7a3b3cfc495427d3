"""Fused kernels give the results of the usual code, and give up with one warning."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from pyro_ext.ops import (
    discretized_logistic,
    discretized_logistic_mixture_log_prob,
    fused,
    normal_scale_mixture,
    use_fused_kernels,
)
from tests.ops import test_discretized_logistic as logistic
from tests.ops import test_normal_scale_mixture as scale_mixture

LENGTH = 1000


@pytest.fixture
def kernels(monkeypatch):
    """Fused kernels for small blocks, which must be used."""
    monkeypatch.setattr(discretized_logistic, "BLOCK_SIZE", 96)
    monkeypatch.setattr(normal_scale_mixture, "BLOCK_SIZE", 32)
    use_fused_kernels()
    yield
    assert fused._State.is_enabled
    use_fused_kernels(False)


def logistic_inputs(C=1, K=3, dtype=torch.float32):
    torch.manual_seed(1)
    value = torch.randint(0, 256, (LENGTH, C))
    value[:40], value[40:80] = 0, 255
    loc = torch.where(torch.rand(LENGTH, C, K) < 0.5, value[..., None], 127) + torch.randn(
        LENGTH, C, K
    )
    loc[80:90] = 1e38
    log_scale = 6 * torch.randn(LENGTH, C, K)
    log_scale[85:95] = -80.0
    parameters = torch.randn(LENGTH, K), loc, log_scale
    return value, [p.to(dtype).requires_grad_() for p in parameters]


def logistic_step(value, parameters):
    log_prob = discretized_logistic_mixture_log_prob(value, *parameters, low=0, high=255)
    with torch.no_grad():
        torch.testing.assert_close(
            discretized_logistic_mixture_log_prob(value, *parameters, low=0, high=255), log_prob
        )
    weights = torch.linspace(0.5, 1, LENGTH)
    return log_prob, *torch.autograd.grad((log_prob * weights).nan_to_num().sum(), parameters)


@pytest.mark.parametrize(
    ("C", "K", "dtype"),
    [
        pytest.param(C, K, dtype, marks=pytest.mark.long if is_quick else pytest.mark.slow)
        for C, K in ((1, 1), (1, 3), (3, 2), (20, 2))
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for is_quick in [C == 3 and dtype == torch.float64]
    ],
    ids=str,
)
def test_logistic_mixture_is_the_same(kernels, C, K, dtype):
    value, parameters = logistic_inputs(C, K, dtype)
    found = logistic_step(value, parameters)
    use_fused_kernels(False)
    expected = logistic_step(value, parameters)
    use_fused_kernels()
    # A log mass of -400 is rounded by 2e-5 in float32, and its exponential by as much.
    options = {"rtol": 5e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **options)


@pytest.mark.long
@pytest.mark.parametrize(("low", "high"), logistic.RANGES.values(), ids=logistic.RANGES)
def test_logistic_mixture_against_sixty_digits(kernels, low, high):
    logistic.test_float32_against_sixty_digits(low, high, 3)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "the paper's" else pytest.mark.slow)
        for name in scale_mixture.COMPONENTS
    ],
)
def test_scale_mixture_against_sixty_digits(kernels, name):
    scale_mixture.test_float32_against_sixty_digits(name)
    x = torch.cat([torch.linspace(-3, 3, 65), torch.tensor([torch.inf, -torch.inf, torch.nan])])
    for dtype in (torch.float16, torch.float32, torch.float64):
        results = []
        for enabled in (True, False, True):
            use_fused_kernels(enabled)
            leaf = x.to(dtype).requires_grad_()
            log_prob = normal_scale_mixture.normal_scale_mixture_log_prob(
                leaf, *scale_mixture.parameters(name), dtype
            )
            results.append((log_prob, *torch.autograd.grad(log_prob.sum(), leaf)))
        torch.testing.assert_close(*results[:2], equal_nan=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_transforms_and_small_inputs_use_no_kernels(monkeypatch):
    def fail(*_):
        raise AssertionError("compiled a kernel")

    monkeypatch.setattr(fused, "_compile", fail)
    use_fused_kernels()
    try:
        logistic.test_function_transforms_agree_with_autograd()
        logistic.test_captured_as_a_graph()
        scale_mixture.test_forward_mode()
        scale_mixture.test_equals_the_plain_formula_at_every_order("the paper's")
    finally:
        use_fused_kernels(False)


def evaluate():
    """Evaluate a large input twice with kernels, and return the results and warnings."""
    scales, log_weights = scale_mixture.parameters("the paper's")
    x = torch.linspace(-1, 1, 2 * normal_scale_mixture.BLOCK_SIZE + 1)
    expected = normal_scale_mixture.normal_scale_mixture_log_prob(
        x, scales, log_weights, torch.float32
    )
    use_fused_kernels()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(2):
            found = normal_scale_mixture.normal_scale_mixture_log_prob(
                x, scales, log_weights, torch.float32
            )
            torch.testing.assert_close(found, expected)
    return [str(warning.message) for warning in record]


@pytest.mark.long
def test_without_a_compiler_or_cache(tmp_path):
    (tmp_path / "file").touch()
    for environment in (
        {"CXX": "no-such-compiler"},
        {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")},
    ):
        run_here("evaluate_without_kernels", tmp_path, environment)


def evaluate_without_kernels():
    (message,) = evaluate()
    assert message.startswith("pyro_ext uses no fused kernels from now on: the compiler fails (")


@pytest.mark.slow
def test_a_fork_after_a_compilation(tmp_path):
    run_here("evaluate_in_a_fork", tmp_path, {})


def evaluate_in_a_fork():
    torch.set_num_threads(1)
    assert evaluate() == []
    child = os.fork()
    if child == 0:
        (message,) = evaluate()
        os._exit(0 if "this process was forked" in message else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert evaluate() == []


def run_here(name, folder, environment):
    """Call a function of this module in a new process, with an empty cache."""
    call = f"from tests.ops.test_fused import {name}; {name}()"
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **environment}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", call], check=True, env=variables, timeout=120
    )
