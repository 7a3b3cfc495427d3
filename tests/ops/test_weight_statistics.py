"""Running statistics against those of all weights at once, and the block jackknife's bias."""

import copy
import math

import mpmath
import pytest
import torch

from pyro_ext.ops import WeightStatistics, jackknife, jackknife_coefficients, log_mean_exp, pareto_k

F64 = {"dtype": torch.float64}


def statistics_of(log_w, chunks, num_samples=None):
    statistics = WeightStatistics(num_samples or len(log_w))
    for chunk in log_w.split(chunks):
        statistics.update(chunk)
    return statistics


@pytest.mark.long
@pytest.mark.parametrize("chunks", [1, 7, 100, [3, 500, 1, 496]])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 30.0])
def test_equal_those_of_all_weights(chunks, scale):
    log_w = 700 + scale * torch.randn(1000, 3, **F64)
    log_w[::5, 1] = -math.inf
    statistics = statistics_of(log_w, chunks)
    w = log_w.softmax(0) * len(log_w)
    torch.testing.assert_close(statistics.log_mean, log_mean_exp(log_w), rtol=1e-14, atol=0)
    torch.testing.assert_close(statistics.ess, len(w) / w.square().mean(0))
    error = ((w - 1).square().mean(0) / len(w)).sqrt()
    torch.testing.assert_close(statistics.std_error, error, rtol=1e-5, atol=1e-14)
    torch.testing.assert_close(statistics.pareto_k, pareto_k(log_w))
    for order in (0, 1, 2):
        torch.testing.assert_close(statistics.jackknife(order), jackknife(log_w, order))


def test_weights_of_zero_first():
    log_w = torch.tensor([-math.inf, -math.inf, 0.0, 1.0], **F64)
    for chunks in (1, 2, 4):
        statistics = statistics_of(log_w, chunks)
        torch.testing.assert_close(statistics.log_mean, log_mean_exp(log_w))
    assert statistics_of(log_w[:2], 1).log_mean == -math.inf


@pytest.mark.parametrize("num_samples", [1025, 5000, 60_000])
def test_memory_does_not_grow_with_the_draws(num_samples):
    statistics = WeightStatistics(num_samples)
    for _ in range(num_samples // 25):
        statistics.update(torch.randn(25, 2, **F64))
    assert sum(map(len, statistics._blocks)) <= 1024
    assert sum(map(len, statistics._tail)) <= 2 * max(256, 3 * math.sqrt(num_samples)) + 2
    assert len(statistics._pending) <= num_samples / 1024 + 1


def test_the_block_jackknife_removes_the_same_terms_of_the_bias():
    """Means of b Gamma(1, 1) weights are Gamma(b, b): the bias is known exactly."""

    def bias(num_blocks, block_size, order):
        with mpmath.workdps(40):
            kept = [block_size * (num_blocks - j) for j in range(order + 1)]
            coefficients = jackknife_coefficients(num_blocks, order)
            terms = zip(coefficients, kept, strict=True)
            return float(sum(c * (mpmath.digamma(n) - mpmath.log(n)) for c, n in terms))

    for order, least in ((0, 1), (1, 2), (2, 3)):
        for block_size in (1, 8):
            slope = math.log2(abs(bias(32, block_size, order) / bias(64, block_size, order)))
            assert slope > least - 0.1
        # As a function of the draws, for a fixed number of blocks.
        slope = math.log2(abs(bias(32, 4, order) / bias(32, 8, order)))
        assert slope > least - 0.1


def test_the_jackknife_over_blocks():
    log_w = torch.randn(4096, **F64)
    statistics = statistics_of(log_w, 100)
    means = log_mean_exp(log_w.unflatten(0, (1024, 4)).T)
    torch.testing.assert_close(statistics.jackknife(2), jackknife(means, 2))
    assert statistics_of(log_w[:24], 24).jackknife(12).isnan()
    early = statistics_of(log_w[:7], 7, num_samples=4096)
    torch.testing.assert_close(early.jackknife(1), jackknife(log_w[:7], 1))
    # Pairs are merged when there is no room left, whatever the chunks; 1,025 is odd.
    for chunks in (1, 10, 1025):
        merged = statistics_of(log_w[:1025], chunks)
        means = log_mean_exp(log_w[:1024].unflatten(0, (512, 2)).T)
        corrected = jackknife(means, 1) - log_mean_exp(means)
        torch.testing.assert_close(merged.jackknife(1), merged.log_mean + corrected)


@pytest.mark.parametrize(("before", "after"), [(25, 20_000), (5000, 20_000)])
def test_the_tail_grows_with_the_plan(before, after):
    log_w = 2 * torch.randn(after, **F64)
    statistics = statistics_of(log_w[:before], 25, num_samples=before)
    statistics.plan(after)
    statistics.update(log_w[before:])
    torch.testing.assert_close(statistics.pareto_k, pareto_k(log_w))


def test_a_copy_is_updated_by_itself():
    log_w = torch.randn(3000, 2, **F64)
    statistics = statistics_of(log_w[:2000], 30, num_samples=3000)
    before = (statistics.log_mean, statistics.ess, statistics.pareto_k, statistics.jackknife(1))
    twin = copy.copy(statistics)
    twin.update(log_w[2000:])
    after = (statistics.log_mean, statistics.ess, statistics.pareto_k, statistics.jackknife(1))
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    at_once = statistics_of(log_w, 3000)
    torch.testing.assert_close(twin.log_mean, at_once.log_mean)
    torch.testing.assert_close(twin.pareto_k, at_once.pareto_k)
    torch.testing.assert_close(twin.jackknife(1), at_once.jackknife(1))
