import itertools
import re

import mpmath
import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_ext.distributions import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    RGBDiscretizedLogisticMixture,
)
from tests.registry import DISTRIBUTIONS

F64 = {"dtype": torch.float64}
SCALAR = pytest.mark.parametrize("name", ["discretized-logistic", "discretized-logistic-mixture"])


def make(name, batch_shape=(), **options):
    cls, parameters, fixed = DISTRIBUTIONS[name]
    return cls(**parameters(batch_shape, **options), **fixed)


@pytest.mark.parametrize("scale", [0.01, 0.3, 20.0, 1e4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (0, 65535)])
def test_masses_sum_to_one_and_cumulate_to_the_cdf(low, high, dtype, tolerance, scale):
    loc = torch.tensor([(low + high) / 2, low - 3.2, high + 0.4, low + 7.5], dtype=dtype)
    d = DiscretizedLogistic(loc, scale, low=low, high=high)
    support = d.enumerate_support()
    cumulated = d.log_prob(support).double().exp().cumsum(0)
    assert (cumulated[-1] - 1).abs().max() < tolerance
    assert (d.cdf(support) - cumulated).abs().max() < tolerance


@SCALAR
def test_moments_mode_and_cdf_by_enumeration(name):
    d = make(name, (2, 3), **F64)
    support = torch.arange(d.low, d.high + 1, **F64).reshape(-1, 1, 1)
    torch.testing.assert_close(d.enumerate_support(expand=False), support)
    assert d.enumerate_support().shape == (12, 2, 3)
    masses = d.log_prob(support).exp()
    mean = (support * masses).sum(0)
    torch.testing.assert_close(d.mean, mean)
    torch.testing.assert_close(d.variance, ((support - mean) ** 2 * masses).sum(0))
    assert (d.mode == masses.argmax(0) + d.low).all()
    for x in (-100.0, -4.5, -1.0, 2.7, 7.0, 99.0):
        expected = (masses * (support <= x)).sum(0)
        torch.testing.assert_close(d.cdf(torch.tensor(x, **F64)), expected)


def test_moments_of_a_wide_range_in_parts():
    d = DiscretizedLogistic(torch.full((40,), 30_000.3, **F64), 50.0, low=0, high=65535)
    # Rounding adds 1 / 12 to the variance of the logistic.
    variance = (50 * torch.pi) ** 2 / 3 + 1 / 12
    torch.testing.assert_close(d.mean, torch.full((40,), 30_000.3, **F64))
    torch.testing.assert_close(d.variance, torch.full((40,), variance, **F64))
    assert (d.mode == 30_000).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float64])
def test_values_of_any_dtype(dtype):
    image = torch.randint(0, 17, (5, 1, 8, 8))
    parameters = torch.randn(3, 5, 1, 8, 8, 4).unbind(0)
    d = DiscretizedLogisticMixture(*parameters[:2], log_scale=parameters[2], low=0, high=16)
    found = d.log_prob(image.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, d.log_prob(image.float()))
    signed = DiscretizedLogistic(torch.zeros(()), 3.0, low=-128, high=127)
    small = torch.tensor([0, 5, 100])
    torch.testing.assert_close(signed.log_prob(small.to(dtype)), signed.log_prob(small.float()))


def test_scale_and_log_scale_are_the_same():
    scale = torch.tensor([0.5, 20.0])
    by_scale = DiscretizedLogistic(3.0, scale)
    by_log_scale = DiscretizedLogistic(3.0, log_scale=scale.log())
    x = torch.tensor([0.0, 255.0])
    torch.testing.assert_close(by_scale.log_prob(x), by_log_scale.log_prob(x))
    torch.testing.assert_close(by_scale.log_scale, by_log_scale.log_scale)
    torch.testing.assert_close(by_scale.scale, by_log_scale.scale)


def test_one_component_is_the_discretized_logistic():
    loc, scale = torch.randn(3, 1) * 50 + 100, torch.rand(3, 1) * 9
    mixture = DiscretizedLogisticMixture(torch.zeros(1), loc, scale)
    single = DiscretizedLogistic(loc[:, 0], scale[:, 0])
    x = torch.randint(0, 256, (10, 3))
    torch.testing.assert_close(mixture.log_prob(x), single.log_prob(x))


def published_likelihood(pixel, weights, means, scales, coeffs, low, high):
    """PixelCNN++ in exact arithmetic: pixels on [-1, 1], bins of half width 1 / (high - low)."""

    def rescale(x):
        return (mpmath.mpf(x) - low) * 2 / (high - low) - 1

    def sigmoid(x):
        return 1 / (1 + mpmath.exp(-x))

    r, g, _ = map(rescale, pixel)
    half = mpmath.mpf(1) / (high - low)
    total = mpmath.mpf(0)
    for weight, mean, scale, c in zip(weights, means, scales, coeffs, strict=True):
        shifted = (mean[0], mean[1] + c[0] * r, mean[2] + c[1] * r + c[2] * g)
        mass = weight
        for x, m, s in zip(pixel, shifted, scale, strict=True):
            above = 1 if x == high else sigmoid((rescale(x) + half - m) / s)
            below = 0 if x == low else sigmoid((rescale(x) - half - m) / s)
            mass *= above - below
        total += mass
    return mpmath.log(total)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 7), (-3, 4)])
def test_rgb_is_the_published_likelihood_after_the_change_of_units(low, high):
    K, N = 3, 40
    logits, loc, log_scale, coeffs = (
        torch.randn(K, **F64),
        0.5 * torch.randn(3, K, **F64),
        torch.randn(3, K, **F64) - 2,
        torch.tanh(torch.randn(3, K, **F64)),
    )
    half_width, middle = (high - low) / 2, (high + low) / 2
    d = RGBDiscretizedLogisticMixture(
        logits, middle + half_width * loc, half_width * log_scale.exp(), None, coeffs, low, high
    )
    pixels = torch.randint(low, high + 1, (N, 3))
    pixels[:8] = torch.tensor(list(itertools.product([low, high], repeat=3)))
    found = d.log_prob(pixels)
    with mpmath.workdps(60):
        weights = [mpmath.exp(x) for x in logits.tolist()]
        weights = [w / sum(weights) for w in weights]
        scales = [[mpmath.exp(x) for x in row] for row in log_scale.T.tolist()]
        for pixel, log_prob in zip(pixels.tolist(), found.tolist(), strict=True):
            expected = published_likelihood(
                pixel, weights, loc.T.tolist(), scales, coeffs.T.tolist(), low, high
            )
            assert log_prob == pytest.approx(float(expected), rel=1e-11)


def test_rgb_coefficients_default_to_independent_channels():
    loc, scale = torch.randn(3, 1) * 3 + 4, torch.rand(3, 1) + 0.5
    rgb = RGBDiscretizedLogisticMixture(torch.zeros(1), loc, scale, low=0, high=9)
    single = DiscretizedLogistic(loc[:, 0], scale[:, 0], low=0, high=9)
    x = torch.randint(0, 10, (20, 3))
    torch.testing.assert_close(rgb.log_prob(x), single.log_prob(x).sum(-1))


def test_enumeration_in_pyro():
    """The exact evidence of a discretized latent by TraceEnum_ELBO."""
    prior = DiscretizedLogistic(torch.tensor(2.0), 1.5, low=0, high=5)
    x = torch.tensor(3.2)

    @config_enumerate
    def model():
        z = pyro.sample("z", prior)
        pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, lambda: None)
    support = prior.enumerate_support()
    joint = prior.log_prob(support) + pyro.distributions.Normal(support, 1.0).log_prob(x)
    assert loss == pytest.approx(-joint.logsumexp(0).item(), rel=1e-6)


@pytest.mark.parametrize("what", ["mean", "variance", "mode", "cdf", "enumerate_support"])
def test_rgb_refuses_moments_with_the_reason(what):
    d = make("rgb-discretized-logistic-mixture")
    calls = {"cdf": lambda: d.cdf(torch.zeros(3)), "enumerate_support": d.enumerate_support}
    call = calls.get(what, lambda: getattr(d, what))
    with pytest.raises(NotImplementedError, match="red that is rounded and clipped"):
        call()


def test_rgb_in_float32_against_float64():
    """Shifts by the other channels are large where the distance to a pixel is small."""
    N, K = 2000, 2
    value = torch.randint(0, 256, (N, 3))
    coeffs = 2 * torch.rand(N, 3, K) - 1
    logits, log_scale = torch.randn(N, K), torch.full((N, 3, K), -4.0)
    red, green = (value[:, i, None] - 127.5 for i in (0, 1))
    shift = coeffs[:, 1] * red + coeffs[:, 2] * green
    shifts = torch.stack([torch.zeros(N, K), coeffs[:, 0] * red, shift], 1)
    loc = value[..., None] - shifts + torch.rand(N, 3, K) - 0.5
    given = [x.requires_grad_() for x in (logits, loc, log_scale, coeffs)]
    found = []
    for dtype in (torch.float32, torch.float64):
        logits, loc, log_scale, coeffs = (x.to(dtype) for x in given)
        d = RGBDiscretizedLogisticMixture(logits, loc, None, log_scale, coeffs)
        log_prob = d.log_prob(value)
        assert log_prob.dtype == dtype
        found.append((log_prob, *torch.autograd.grad(log_prob.sum(), given)))
    assert ((found[0][0] / found[1][0] - 1).abs() < 5e-6).all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("loc", "log_scale", "high"), [(200.5, -12.0, 255), (50_000.5, -6.0, 65535)]
)
def test_draws_on_the_border_of_two_bins(loc, log_scale, high):
    d = DiscretizedLogistic(torch.tensor(loc), log_scale=torch.tensor(log_scale), high=high)
    share = (d.sample((20_000,)) == loc - 0.5).double().mean()
    assert abs(share - 0.5) < 4.5 * 0.5 / 20_000**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_nothing_but_the_rounding_of_its_input(dtype):
    for given in ({"scale": 0.30078125}, {"log_scale": -1.5}):
        given = {key: torch.tensor(x, dtype=dtype) for key, x in given.items()}
        half = DiscretizedLogistic(torch.tensor([120.0], dtype=dtype), **given)
        wide = {key: x.double() for key, x in given.items()}
        double = DiscretizedLogistic(torch.tensor([120.0], **F64), **wide)
        x = torch.tensor([118.0, 120.0, 121.0], dtype=dtype)
        for method in ("log_prob", "cdf"):
            found, expected = getattr(half, method)(x), getattr(double, method)(x.double())
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


def test_given_scales_keep_all_digits():
    """The round trip by the logarithm would lose half an ulp of it."""
    loc = torch.tensor(-43862.609375)
    found = DiscretizedLogistic(loc, torch.tensor(3282.06201171875)).log_prob(torch.tensor(0.0))
    assert found.item() == pytest.approx(-1.5699006e-6, rel=2e-6)


def test_integer_locations_with_a_number_as_scale():
    whole = DiscretizedLogistic(torch.tensor([3], dtype=torch.uint8), scale=1.9)
    fraction = DiscretizedLogistic(torch.tensor([3.0]), scale=1.9)
    assert whole.log_prob(torch.tensor([5])) == fraction.log_prob(torch.tensor([5]))


def test_components_whose_log_mass_overflows():
    log_scale = torch.tensor([-78.0, 0.0], requires_grad=True)
    loc = torch.tensor([0.0, 65535.0])
    d = DiscretizedLogisticMixture(torch.zeros(2), loc, log_scale=log_scale, low=0, high=65535)
    (gradient,) = torch.autograd.grad(d.log_prob(torch.tensor(65535)), log_scale)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.1887703]))
    far = DiscretizedLogistic(torch.tensor([1e5]), log_scale=torch.tensor([-80.0]))
    assert far.log_prob(torch.tensor([3])) == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_if_all_log_masses_overflow_the_nearest_component_has_the_share(dtype):
    far = torch.finfo(dtype).max / 2
    loc = torch.tensor([-far, far / 2, far], dtype=dtype, requires_grad=True)
    logits = torch.zeros(3, dtype=dtype, requires_grad=True)
    log_scale = torch.full((3,), -80.0, dtype=dtype, requires_grad=True)
    log_prob = DiscretizedLogisticMixture(logits, loc, None, log_scale).log_prob(torch.tensor(3))
    assert log_prob == -torch.inf
    by_logits, by_loc, by_log_scale = torch.autograd.grad(log_prob, (logits, loc, log_scale))
    third = torch.full((), 1 / 3, dtype=dtype)
    torch.testing.assert_close(by_logits, torch.tensor([0.0, 1.0, 0.0]).to(dtype) - third)
    steep = -torch.full((), 80.0, dtype=dtype).exp()
    torch.testing.assert_close(by_loc, torch.tensor([0.0, 1.0, 0.0]).to(dtype) * steep)
    assert by_log_scale.tolist() == [0.0, torch.finfo(dtype).max, 0.0]


P = torch.ones(2)
BAD_PIXELS = {
    "fraction": (0.5, "integers in 0..255, but one is 0.5. Values in [0, 1] are not rescaled"),
    "negative": (-1.0, "integers in 0..255, but one is -1.0"),
    "too large": (256.0, "integers in 0..255, but one is 256.0"),
    "far too large": (300, "integers in 0..255, but one is 300.0"),
    "nan": (float("nan"), "integers in 0..255, but one is nan"),
}


@pytest.mark.parametrize(("pixel", "message"), BAD_PIXELS.values(), ids=BAD_PIXELS)
def test_bad_pixels(pixel, message):
    distributions = (
        DiscretizedLogistic(P, P),
        DiscretizedLogisticMixture(P, P, P),
        RGBDiscretizedLogisticMixture(P, P.expand(3, 2), P.expand(3, 2)),
    )
    for d in distributions:
        value = torch.full((2, *d.event_shape), pixel)
        with pytest.raises(ValueError, match=re.escape(message)):
            d.expand((2,)).log_prob(value)


M = torch.ones(3, 2)
ERRORS = {
    "both": (
        lambda: DiscretizedLogistic(P, P, P),
        "exactly one of scale and log_scale .* both are",
    ),
    "neither": (
        lambda: DiscretizedLogisticMixture(P, P),
        "exactly one of scale and log_scale .* neither is",
    ),
    "scale of zero": (lambda: DiscretizedLogistic(P, 0 * P), "parameter scale"),
    "negative scale": (lambda: DiscretizedLogisticMixture(P, P, -P), "parameter scale"),
    "components": (
        lambda: DiscretizedLogisticMixture(torch.ones(3), P, P),
        r"same number of components, at least one, .*'logits': \(3,\), 'loc': \(2,\)",
    ),
    "coeffs": (
        lambda: RGBDiscretizedLogisticMixture(P, M, M, coeffs=torch.ones(2, 2)),
        r"the parameters do not broadcast: .*'coeffs': \(2, 2\)",
    ),
    "two channels": (
        lambda: RGBDiscretizedLogisticMixture(P, M[:2], M[:2], coeffs=M[:2]),
        r"loc must be a tensor of shape \(..., 3, K\), but its shape is \(2, 2\)",
    ),
    "coeffs without channels": (
        lambda: RGBDiscretizedLogisticMixture(P, M, M, coeffs=P),
        r"coeffs must be a tensor of shape \(..., 3, K\), but its shape is \(2,\)",
    ),
    "empty range": (
        lambda: DiscretizedLogistic(P, P, low=3, high=3),
        "low must be less than high.* low is 3",
    ),
    "wrong batch": (lambda: DiscretizedLogistic(P, P).log_prob(torch.zeros(3)), "broadcast"),
    "no components": (
        lambda: DiscretizedLogisticMixture(*torch.ones(3, 5, 0)),
        "number of components, at least one",
    ),
    "shapes": (lambda: DiscretizedLogistic(P, torch.ones(3)), "shapes of loc and scale do not"),
    "number as value": (lambda: DiscretizedLogistic(P, P).log_prob(3), "must be a Tensor"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: DiscretizedLogistic(P, P, low=0.0, high=1.0),
            "low must be an integer, but it is 0.0",
        ),
        (
            lambda: RGBDiscretizedLogisticMixture(P, 1.0, M),
            r"loc must be a tensor of shape \(..., 3, K\), but it is 1.0",
        ),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
