"""Extreme but finite inputs: no NaN, no infinity where a finite value is right, and all digits."""

import mpmath
import pytest
import torch

from pyro_ext.distributions import NormalScaleMixture
from tests.distributions import references
from tests.distributions.hostile import (
    DISCRETIZED,
    RANGES,
    Draws,
    components,
    normal_scale_mixture,
)

WIDE = [torch.float32, torch.float64]
HALF = [torch.float16, torch.bfloat16]
DTYPES = pytest.mark.parametrize("dtype", WIDE + HALF, ids=str)
#: the number of inputs, of which some have a reference
SIZES = pytest.mark.parametrize("N", [2000, pytest.param(1_000_000, marks=pytest.mark.slow)])
CHUNK = 50_000
NUM_COMPARED = 60

#: the relative errors of log densities, of their gradients and of distribution functions
TOLERANCES = {torch.float32: (5e-6, 2e-5, 2e-5), torch.float64: (1e-13, 1e-12, 1e-11)}


def chunks(N):
    return [min(CHUNK, N - start) for start in range(0, N, CHUNK)]


def draws_of(dtype, seed):
    return Draws(dtype, torch.Generator().manual_seed(seed))


def some_rows(log_prob, generator):
    """Random rows, and rows whose log density overflows."""
    beyond = log_prob.isinf().nonzero()[:, 0]
    beyond = beyond[torch.randperm(len(beyond), generator=generator)[: NUM_COMPARED // 2]]
    return [*torch.randperm(len(log_prob), generator=generator)[:NUM_COMPARED].tolist(), *beyond]


def assert_close(found, expected, error, dtype):
    """With the largest number or infinity for a number beyond the largest."""
    largest = mpmath.mpf(torch.finfo(dtype).max)
    if abs(expected) >= largest * (1 - mpmath.mpf("1e-4")) and abs(found) >= largest:
        assert (found > 0) == (expected > 0)
    else:
        assert abs(found - expected) <= error, (found, mpmath.nstr(expected, 20))


def assert_gradients(found, expected, log_prob, floors, dtype):
    """Compare the gradients of one row.

    The shares of the components depend on differences of log masses, in which digits cancel.
    """
    tolerance = TOLERANCES[dtype][1]
    shares = expected["shares"]
    lost = 4 * torch.finfo(dtype).eps * abs(log_prob)
    for name, gradient in found.items():
        rows = gradient.reshape(-1, gradient.shape[-1]).tolist()
        sizes = rows_of(expected.get(f"sizes of {name}", expected[name]))
        for row, terms, size in zip(rows, rows_of(expected[name]), sizes, strict=True):
            largest = max(1 if name == "logits" else 0, *map(abs, size))
            for k, (one, term, share) in enumerate(zip(row, terms, shares, strict=True)):
                slope = 1 if name == "logits" or share == 0 else abs(term / share)
                others = sum(shares[:k] + shares[k + 1 :])
                error = tolerance * largest + spread(share, others, lost) * slope + floors[name]
                assert_close(one, term, error, dtype)


def spread(share, others, error):
    """How far a share can move if the log masses have an error."""
    lower, upper = (share / (share + others * mpmath.exp(sign * 2 * error)) for sign in (1, -1))
    return upper - lower


def rows_of(terms):
    return terms if isinstance(terms[0], list) else [terms]


def check_log_prob(found, expected, dtype):
    limits = torch.finfo(dtype)
    # Near mass one, the value is a small tail exp(n), which has the relative error of n x n.
    of_tail = 2 * limits.eps * max(0, -mpmath.log(abs(expected) + limits.tiny))
    error = (TOLERANCES[dtype][0] + of_tail) * abs(expected) + limits.tiny
    assert_close(found, expected, error, dtype)


def gradients_of(log_prob, given):
    return dict(zip(given, torch.autograd.grad(log_prob.sum(), list(given.values())), strict=True))


def check_discretized_row(n, value, given, log_prob, gradients, low, high, dtype):
    row = {key: x[n].double() for key, x in given.items()}
    if "logits" not in row:
        row = {"logits": torch.zeros(1), **{key: x[None] for key, x in row.items()}}
        gradients = {key: x[..., None] for key, x in gradients.items()}
    K = len(row["logits"])
    # A tail may be too small for the dtype, while its product with 1 / scale is not.
    steepest = (-row["log_scale"]).exp().amax().clamp(min=1).item()
    factors = None
    if "coeffs" in row:
        # The sum is rounded in float64, so the reference starts from the sum.
        red, green = (value[n, :2] - (low + high) / 2).tolist()
        c0, c1, c2 = row.pop("coeffs")
        of_red, of_green, of_blue = row["loc"]
        row["loc"] = torch.stack([of_red, of_green + c0 * red, of_blue + c1 * red + c2 * green])
        factors = [(1, red), (2, red), (2, green)]
    row = {key: x.reshape(-1, K).tolist() for key, x in row.items()}
    row["logits"] = row["logits"][0]
    pixel = value[n].reshape(-1).tolist()
    expected, terms = references.discretized_mixture(
        pixel, **row, low=low, high=high, factors=factors
    )
    check_log_prob(log_prob[n].item(), expected, dtype)
    floor = steepest * torch.finfo(dtype).tiny
    floors = {"logits": floor, "loc": floor, "log_scale": floor, "coeffs": floor * (high - low)}
    found = {key: x[n] for key, x in gradients.items()}
    assert_gradients(found, terms, expected, floors, dtype)
    if len(pixel) == 1:
        row = [row["logits"], *row["loc"], *row["log_scale"]]
        return references.discretized_cdf(*pixel, *row, low=low, high=high)
    return None


@SIZES
@DTYPES
@pytest.mark.parametrize("name", DISCRETIZED)
def test_discretized_logistics(name, dtype, N):
    for i, (low, high) in enumerate(RANGES):
        draws = draws_of(dtype, i)
        for size in chunks(N // len(RANGES)):
            cls, value, given = DISCRETIZED[name](draws, size, low, high)
            for x in given.values():
                x.requires_grad_()
            d = cls(**given, low=low, high=high)
            log_prob = d.log_prob(value)
            assert not log_prob.isnan().any()
            gradients = gradients_of(log_prob, given)
            assert not any(g.isnan().any() for g in gradients.values())
            if dtype in WIDE:  # the derivatives of half precision may overflow
                assert gradients["log_scale"].isfinite().all()
                assert gradients["loc"].isfinite().all()
            assert d.support.check(d.sample()).all()
            if d.event_shape == ():
                check_discretized_cdf(d, value, low, high)
        if dtype in WIDE:
            with mpmath.workdps(60):
                below = d.cdf(value) if d.event_shape == () else None
                for n in some_rows(log_prob, draws.generator):
                    cdf = check_discretized_row(
                        n, value, given, log_prob, gradients, low, high, dtype
                    )
                    if cdf is not None:
                        error = TOLERANCES[dtype][2] * cdf + torch.finfo(dtype).tiny
                        assert_close(below[n].item(), cdf, error, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", [*DISCRETIZED, "normal-scale-mixture"])
def test_huge_logits(name, dtype):
    """Where differences of logits lose the digits of the others, there is no NaN."""
    draws = draws_of(dtype, 0)
    if name == "normal-scale-mixture":
        cls, value, given = normal_scale_mixture(draws, 10_000)
    else:
        cls, value, given = DISCRETIZED[name](draws, 10_000, 0, 65535)
        given.pop("logits", None)
    if name != "discretized-logistic":
        given["logits"] = draws.huge_logits((10_000, next(iter(given.values())).shape[-1]))
    for x in given.values():
        x.requires_grad_()
    options = {} if name == "normal-scale-mixture" else {"low": 0, "high": 65535}
    log_prob = cls(**given, **options).log_prob(value)
    assert not log_prob.isnan().any()
    for gradient in gradients_of(log_prob, given).values():
        assert not gradient.isnan().any()


def check_discretized_cdf(d, value, low, high):
    for x in (value, value + 0.4, torch.full_like(value, torch.inf)):
        below = d.cdf(x.to(d.loc.dtype))
        given = [d.loc, d.log_scale]
        assert ((below >= 0) & (below <= 1 + 2 * torch.finfo(below.dtype).eps)).all()
        assert not any(g.isnan().any() for g in torch.autograd.grad(below.sum(), given))


@SIZES
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
def test_normal_scale_mixture_with_components_of_their_own(dtype, N):
    draws = draws_of(dtype, 0)
    for size in chunks(N):
        cls, value, given = normal_scale_mixture(draws, size)
        check_normal_scale_mixture(cls(**given), value, given, dtype)


@SIZES
@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
def test_normal_scale_mixture_with_fixed_components(dtype, N):
    draws = draws_of(dtype, 1)
    sets = [components(draws, 1) for _ in range(20)]
    for scales, logits in sets:
        scales, logits = scales[0], logits[0]
        size = N // len(sets)
        near = scales[torch.randint(3, (size,), generator=draws.generator)].double()
        near = near * draws.powers(-5, 5, (size,))
        largest = torch.finfo(dtype).max / 4
        value = draws.one_of(near, scales[0] * draws.powers(-20, 160, (size,)), near * 0)
        value = value.clamp(-largest, largest).to(dtype)
        d = NormalScaleMixture(scales, logits=logits)
        check_normal_scale_mixture(d, value, {}, dtype)


def check_normal_scale_mixture(d, value, given, dtype):
    value.requires_grad_()
    for x in given.values():
        x.requires_grad_()
    cls = type(d)
    if given:
        d = cls(**given)
    log_prob, below = d.log_prob(value), d.cdf(value)
    gradients = gradients_of(log_prob, {"value": value, **given})
    draws = d.sample((1 if given else len(value),))
    for x in (log_prob, below, draws, *gradients.values()):
        assert not x.isnan().any()
    slopes = torch.autograd.grad(below.sum(), [value, *given.values()])
    assert not any(x.isnan().any() for x in slopes)
    if dtype not in WIDE:
        return
    scales, logits = (x.detach().double().expand(len(value), 3) for x in (d.scales, d.logits))
    if given:
        logits = given["logits"].detach().double()
    floor = torch.finfo(dtype).tiny
    with mpmath.workdps(60):
        for n in some_rows(log_prob, torch.Generator().manual_seed(0)):
            expected, terms, cdf = references.normal_scale_mixture(
                value[n].item(), scales[n].tolist(), logits[n].tolist()
            )
            check_log_prob(log_prob[n].item(), expected, dtype)
            error = TOLERANCES[dtype][2] * cdf + floor
            assert_close(below[n].item(), cdf, error, dtype)
            slopes = terms.pop("value")
            error = TOLERANCES[dtype][1] * max(map(abs, slopes)) + floor
            assert_close(gradients["value"][n].item(), sum(slopes), error, dtype)
            found = {key: gradients[key][n] for key in given}
            assert_gradients(found, terms, expected, dict.fromkeys(given, floor), dtype)
