import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroSample

from pyro_ext.distributions import NormalScaleMixture
from tests.statistics import assert_mean

F64 = {"dtype": torch.float64}


def exact(x, scales, probs):
    """log p(x), and its derivatives in x and the scales with the largest term of each."""
    with mpmath.workdps(60):
        x, scales, probs = mpmath.mpf(x), [*map(mpmath.mpf, scales)], [*map(mpmath.mpf, probs)]
        total = sum(probs)
        densities = [
            p / total * mpmath.exp(-((x / s) ** 2) / 2) / s / mpmath.sqrt(2 * mpmath.pi)
            for p, s in zip(probs, scales, strict=True)
        ]
        density = sum(densities)
        shares = [d / density for d in densities]
        by_x = [-share * x / s**2 for share, s in zip(shares, scales, strict=True)]
        by_scale = [share * ((x / s) ** 2 - 1) / s for share, s in zip(shares, scales, strict=True)]
        return mpmath.log(density), sum(by_x), max(map(abs, by_x)), by_scale


@pytest.mark.parametrize("seed", range(4))
def test_float32_against_sixty_digits(seed):
    """Ratios of scales up to 1e12, weights down to 1e-30, values up to 1e10."""
    generator = torch.Generator().manual_seed(seed)
    N, K = 100, 3
    scales = 10 ** (12 * torch.rand(N, K, generator=generator) - 2)
    probs = 10 ** (-30 * torch.rand(N, K, generator=generator))
    probs[:, 0] = 1.0
    x = 10 ** (20 * torch.rand(N, generator=generator) - 10)
    x = x.where(torch.rand(N, generator=generator) < 0.5, -x)
    for tensor in (x, scales):
        tensor.requires_grad_()
    log_prob = NormalScaleMixture(scales, probs=probs).log_prob(x)
    by_x, by_scale = torch.autograd.grad(log_prob.sum(), (x, scales))
    num_compared = 0
    for n in range(N):
        value, dx, largest, ds = exact(x[n].item(), scales[n].tolist(), probs[n].tolist())
        if value < -1e38:
            continue  # no float32
        num_compared += 1
        assert abs(log_prob[n].item() - value) <= 5e-6 * max(abs(value), mpmath.mpf("1e-6"))
        assert abs(by_x[n].item() - dx) <= 2e-5 * largest + mpmath.mpf("1e-37")
        for k in range(K):
            bound = 2e-5 * max(map(abs, ds)) + mpmath.mpf("1e-37")
            assert abs(by_scale[n, k].item() - ds[k]) <= bound
    assert num_compared > N / 2


def test_moments_and_distribution_function():
    d = NormalScaleMixture(torch.tensor([0.5, 2.0], **F64), torch.tensor([0.3, 0.7], **F64))
    assert d.mean == 0
    assert d.variance.item() == pytest.approx(0.3 * 0.25 + 0.7 * 4)
    draws = d.sample((200_000,))
    assert_mean(draws, d.mean)
    assert_mean(draws.square(), d.variance)
    grid = torch.linspace(-6, 6, 2001, **F64)
    cumulated = torch.cumulative_trapezoid(d.log_prob(grid).exp(), grid)
    torch.testing.assert_close(d.cdf(grid)[1:] - d.cdf(grid)[0], cumulated, atol=1e-5, rtol=0)
    assert d.expand((3,)).cdf(grid[0]).shape == (3,)


def test_probs_and_logits_are_the_same():
    scales, probs = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])
    by_probs = NormalScaleMixture(scales, probs=probs)
    by_logits = NormalScaleMixture(scales, logits=probs.log() + 5)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(by_probs.log_prob(x), by_logits.log_prob(x))
    torch.testing.assert_close(by_probs.probs, torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(by_probs.logits, by_logits.logits)
    torch.testing.assert_close(by_probs.probs, by_logits.probs)


@pytest.mark.parametrize("weights", ["probs", "logits"])
def test_path_gradients_are_unbiased(weights):
    """E z^2 and E z^4 of 0.4 N(0, 0.5) + 0.6 N(0, 1.5), and E exp(z), in closed form."""
    N = 200_000
    scales = torch.tensor([0.5, 1.5], **F64).expand(N, 2).clone().requires_grad_()
    start = torch.tensor([0.4, 0.6], **F64)
    given = (start if weights == "probs" else start.log()).expand(N, 2).clone().requires_grad_()
    z = NormalScaleMixture(scales, **{weights: given}).rsample()

    s, w = (t[0].detach().requires_grad_() for t in (scales, given))
    p = w / w.sum() if weights == "probs" else w.softmax(-1)
    tests = (
        (z.square(), (p * s**2).sum()),
        (z**4, (p * 3 * s**4).sum()),
        (z.exp(), (p * (s**2 / 2).exp()).sum()),
    )
    for function, mean in tests:
        found = torch.autograd.grad(function.sum(), (scales, given), retain_graph=True)
        expected = torch.autograd.grad(mean, (s, w), retain_graph=True)
        for gradient, exact_gradient in zip(found, expected, strict=True):
            assert_mean(gradient, exact_gradient)


def test_path_derivative_keeps_the_distribution_function():
    scales = torch.tensor([0.3, 2.0], **F64, requires_grad=True)
    logits = torch.tensor([0.2, -0.4], **F64, requires_grad=True)
    pyro.set_rng_seed(1)
    z = NormalScaleMixture(scales, logits=logits).rsample((50,))
    jacobian = [torch.autograd.grad(z[i], (scales, logits), retain_graph=True) for i in range(50)]
    step = 1e-5
    for parameter in range(2):
        for k in range(2):
            moved = []
            for sign in (1, -1):
                bump = [x.detach().clone() for x in (scales, logits)]
                bump[parameter][k] += sign * step
                moved.append(NormalScaleMixture(bump[0], logits=bump[1]))
            density = NormalScaleMixture(scales, logits=logits).log_prob(z).exp()
            slope = -(moved[0].cdf(z) - moved[1].cdf(z)) / (2 * step) / density
            found = torch.stack([row[parameter][k] for row in jacobian])
            torch.testing.assert_close(found, slope.detach(), rtol=1e-5, atol=1e-7)


def test_tails_have_finite_gradients():
    """A draw 60 narrow scales out comes from the wide component alone."""
    scales = torch.tensor([1e-3, 1.0], requires_grad=True)
    probs = torch.tensor([1 - 1e-6, 1e-6], requires_grad=True)
    z = NormalScaleMixture(scales, probs=probs).rsample((1_000_000,))
    assert z.abs().max() > 0.06
    for gradient in torch.autograd.grad(z.square().sum(), (scales, probs)):
        assert gradient.isfinite().all()


def test_a_weight_of_zero():
    scales = torch.tensor([0.5, 2.0], requires_grad=True)
    probs = torch.tensor([1.0, 0.0], requires_grad=True)
    d = NormalScaleMixture(scales, probs=probs)
    x = torch.tensor([0.1, 3.0])
    torch.testing.assert_close(d.log_prob(x), dist.Normal(0.0, 0.5).log_prob(x))
    for value in (d.log_prob(x), d.rsample((10,))):
        for gradient in torch.autograd.grad(value.sum(), (scales, probs)):
            assert gradient.isfinite().all()


def test_prior_of_a_module():
    net = PyroModule[torch.nn.Linear](3, 1)
    prior = NormalScaleMixture(torch.tensor([1.0, 0.01]), probs=torch.tensor([0.5, 0.5]))
    net.weight = PyroSample(prior.expand([1, 3]).to_event(2))
    x = torch.randn(20, 3)

    def model(x):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))

    def guide(x):
        scales = pyro.param("scales", torch.ones(1, 3, 2), constraint=dist.constraints.positive)
        logits = pyro.param("logits", torch.zeros(1, 3, 2))
        pyro.sample("weight", NormalScaleMixture(scales, logits=logits).to_event(2))
        return {}

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=5))
    assert all(math.isfinite(svi.step(x)) for _ in range(5))


def test_path_gradients_under_function_transforms():
    def second_moment(scales, logits):
        prior = NormalScaleMixture(scales, logits=logits, validate_args=False)
        draw = prior.rsample((20_000,))
        return draw.square().mean()

    scales, logits = torch.tensor([0.5, 2.0], **F64), torch.zeros(2, **F64)
    expected = scales  # of (0.5 s1^2 + 0.5 s2^2)
    inside = torch.func.vmap(torch.func.grad(second_moment), (0, None), randomness="different")
    torch.testing.assert_close(
        inside(scales.expand(3, 2), logits), expected.expand(3, 2), rtol=0.1, atol=0
    )

    def outside(scales):
        batched = torch.func.vmap(second_moment, (0, None), randomness="different")
        return batched(scales.expand(3, 2), logits).mean()

    torch.testing.assert_close(torch.func.grad(outside)(scales), expected, rtol=0.1, atol=0)


def test_second_derivatives_of_draws_are_refused():
    scales = torch.tensor([0.5, 2.0], requires_grad=True)
    draw = NormalScaleMixture(scales, logits=torch.zeros(2)).rsample((10,))
    (first,) = torch.autograd.grad(draw.square().sum(), scales, create_graph=True)
    with pytest.raises(NotImplementedError, match="rsample can only be differentiated once"):
        torch.autograd.grad(first.sum(), scales)


def test_extreme_ratios_of_values_to_scales():
    """The log density overflows, or would on the way, but its gradients do not."""
    x = torch.tensor([1e155, 3e300, -1e155], **F64, requires_grad=True)
    scales = torch.tensor([[1.0, 0.5], [1e150, 1e150], [1e10, 1.0]], **F64, requires_grad=True)
    log_prob = NormalScaleMixture(scales, probs=torch.tensor([0.5, 0.5], **F64)).log_prob(x)
    by_x, by_scales = torch.autograd.grad(log_prob.sum(), (x, scales))
    torch.testing.assert_close(log_prob[1].item(), -4.5e300, rtol=1e-12, atol=0)
    assert log_prob[0] == -math.inf
    torch.testing.assert_close(by_x, torch.tensor([-1e155, -3.0, 1e135], **F64))
    expected = [[math.inf, 0.0], [4.5e150, 4.5e150], [1e280, 0.0]]
    torch.testing.assert_close(by_scales, torch.tensor(expected, **F64))
    x.requires_grad_(False)
    shared = x[:1].clone().requires_grad_()
    fixed = NormalScaleMixture(scales[0].detach(), probs=torch.tensor([0.5, 0.5], **F64))
    torch.testing.assert_close(*torch.autograd.grad(fixed.log_prob(shared), shared), by_x[:1])


def test_small_tails_keep_their_digits():
    d = NormalScaleMixture(torch.tensor([1.0, 0.1], **F64), torch.tensor([1e-3, 1.0], **F64))
    x = torch.tensor([-38.0, -20.0, -9.0, -0.5], **F64)
    with mpmath.workdps(60):
        for value, found in zip(x.tolist(), d.cdf(x).tolist(), strict=True):
            terms = ((mpmath.mpf(0.001), mpmath.mpf(1.0)), (mpmath.mpf(1.0), mpmath.mpf(0.1)))
            total = sum(w for w, _ in terms)
            expected = sum(w / total * mpmath.ncdf(mpmath.mpf(value) / s) for w, s in terms)
            assert found == pytest.approx(float(expected), rel=1e-12)


def test_large_weights_and_scales_do_not_overflow_on_the_way():
    probs = torch.tensor([3e38, 1e38, 3e38])
    torch.testing.assert_close(
        NormalScaleMixture(torch.ones(3), probs=probs).probs, torch.tensor([3.0, 1.0, 3.0]) / 7
    )
    d = NormalScaleMixture(torch.tensor([1e20, 1.0]), probs=torch.tensor([1e-10, 1.0]))
    assert d.variance.item() == pytest.approx(1e30, rel=1e-5)
    d = NormalScaleMixture(torch.tensor([1e20, 1.0]), probs=torch.tensor([0.0, 1.0]))
    assert d.variance == 1


@pytest.mark.parametrize("is_widest", [False, True])
def test_a_large_negative_logit_excludes_a_component(is_widest):
    scales = torch.tensor([2.0, 0.5]) if is_widest else torch.tensor([0.1, 0.5])
    logits = torch.tensor([torch.finfo(torch.float32).min, 0.0])
    x = torch.tensor([0.0, 0.3, -4.0])
    expected = dist.Normal(0.0, 0.5).log_prob(x)
    torch.testing.assert_close(NormalScaleMixture(scales, logits=logits).log_prob(x), expected)


ERRORS = {
    "both": (
        lambda s: NormalScaleMixture(s, probs=s, logits=s),
        "one of probs and logits .* both are",
    ),
    "neither": (NormalScaleMixture, "exactly one of probs and logits .* neither is"),
    "components": (
        lambda s: NormalScaleMixture(s, probs=torch.ones(3)),
        r"same number of components, at least one, .*\(2,\).*\(3,\)",
    ),
    "shapes": (
        lambda s: NormalScaleMixture(s.expand(3, 2), probs=s.expand(4, 2)),
        "shapes of the parameters do not broadcast",
    ),
    "no components": (
        lambda s: NormalScaleMixture(torch.tensor(1.0), probs=s),
        r"scales must be a tensor of shape \(..., K\), but its shape is \(\)",
    ),
    "scale of zero": (lambda s: NormalScaleMixture(s * 0, probs=s), "parameter scales"),
    "negative weight": (
        lambda s: NormalScaleMixture(s, probs=torch.tensor([-1.0, 2.0])),
        "parameter probs",
    ),
    "negative weights": (
        lambda s: NormalScaleMixture(s, probs=torch.tensor([-1.0, -3.0])),
        "parameter probs",
    ),
    "text": (lambda s: NormalScaleMixture(s, probs=s).log_prob("x"), "must be a Tensor"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2))


def test_a_number_for_a_tensor():
    with pytest.raises(TypeError, match=r"scales must be a tensor of shape .* but it is 1\.0"):
        NormalScaleMixture(1.0, probs=torch.ones(2))
