"""The log evidences of the posteriors, against quadrature, exact posteriors and other samplers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ext.infer import estimate_evidence
from tests.posteriors import POSTERIORS, eight_schools, funnel, logistic_regression, two_modes
from tests.posteriors.regression import NOISE

EXACT = ("regression_1", "regression_10", "regression_50", "two_modes_2", "two_modes_20")
SCHOOLS = (eight_schools.SIGMA, eight_schools.Y)


def log_joint(model, args, **values):
    return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum().item()


def regression_posterior(design, y):
    precision = design.T @ design / NOISE**2 + torch.eye(design.shape[1], dtype=y.dtype)
    loc = torch.linalg.solve(precision, design.T @ y) / NOISE**2
    return dist.MultivariateNormal(loc, precision_matrix=precision), "w"


def two_modes_posterior(x):
    shrinkage = two_modes.PRIOR_SCALE**2 / (two_modes.PRIOR_SCALE**2 + two_modes.NOISE**2)
    locs = torch.tensor([loc for loc, _ in two_modes.MODES], dtype=x.dtype) * shrinkage
    components = dist.Normal(locs.unsqueeze(-1).expand(2, len(x)), two_modes.NOISE * shrinkage**0.5)
    masses = dist.Categorical(logits=two_modes.log_masses(len(x)))
    return dist.MixtureSameFamily(masses, components.to_event(1)), "z"


@pytest.mark.parametrize("name", EXACT)
def test_joint_over_posterior_is_the_evidence_everywhere(name):
    """log p(x, z) - log p(z | x) is log p(x) for any z."""
    found = POSTERIORS[name]()
    exact, site = (regression_posterior if "regression" in name else two_modes_posterior)(
        *found.args
    )
    for _ in range(5):
        z = exact.sample()
        log_evidence = log_joint(found.model, found.args, **{site: z}) - exact.log_prob(z).item()
        assert log_evidence == pytest.approx(found.log_evidence, abs=1e-8)


def test_eight_schools_by_quadrature_over_mu_and_tau():
    mu = torch.linspace(-40.0, 40.0, 161, dtype=torch.float64)
    tau = 5 * torch.linspace(0.0, 7.0, 4001, dtype=torch.float64).sinh()
    log_p = dist.HalfCauchy(tau.new_tensor(5.0)).log_prob(tau)
    for y, sigma in zip(*reversed(SCHOOLS), strict=True):
        scale = (sigma.square() + tau.square()).sqrt()
        log_p = log_p + dist.Normal(mu.unsqueeze(-1), scale).log_prob(y)
    log_p = log_p + dist.Normal(0.0, 5.0).log_prob(mu).unsqueeze(-1)
    total = torch.trapezoid(torch.trapezoid((log_p + 30).exp(), tau), mu).log() - 30
    log_evidence = eight_schools.log_evidence()
    assert log_evidence == pytest.approx(total.item(), abs=1e-6)
    assert log_evidence == pytest.approx(-31.3113, abs=1e-4)
    assert log_evidence == pytest.approx(eight_schools.log_evidence(400), abs=1e-9)


def centered_guide(sigma, y):
    """Wide in tau, exact in the others given tau."""
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_full((), 5.0)))
    weights = 1 / (sigma.square() + tau.square().unsqueeze(-1))
    precision = weights.sum(-1) + 1 / 25
    mu = pyro.sample("mu", dist.Normal((weights * y).sum(-1) / precision, precision**-0.5))
    with pyro.plate("school", len(y)):
        share = tau.square() / (sigma.square() + tau.square())
        pyro.sample("theta", dist.Normal(mu + share * (y - mu), share.sqrt() * sigma))


def funnel_guide(y):
    """The prior in v, exact in x given v."""
    v = pyro.sample("v", dist.Normal(y.new_zeros(()), 3.0))
    share = (1 / (1 + funnel.NOISE**2 * (-v).exp())).unsqueeze(-1)
    pyro.sample("x", dist.Normal(share * y, share.sqrt() * funnel.NOISE).to_event(1))


@pytest.mark.filterwarnings("ignore:Plate 'school' holds")
@pytest.mark.parametrize(
    ("name", "guide"),
    [("eight_schools_centered", centered_guide), ("funnel_observed", funnel_guide)],
)
def test_guides_that_are_exact_but_for_one_site(name, guide):
    found = POSTERIORS[name]()
    evidence = estimate_evidence(
        found.model, guide, *found.args, num_samples=20_000, chunk_size=5000
    )
    assert evidence.std_error < 0.02
    assert abs(evidence.log_evidence - found.log_evidence) < 4.5 * evidence.std_error


def test_the_funnel_is_normalised():
    found = POSTERIORS["funnel"]()
    evidence = estimate_evidence(found.model, None, *found.args, num_samples=10)
    assert evidence.log_evidence == pytest.approx(found.log_evidence, abs=1e-12)
    assert funnel.observed_log_evidence() == pytest.approx(funnel.observed_log_evidence(400))


def test_both_eight_schools_are_one_model():
    """p(theta) is p(eta) / tau for each school."""
    theta, mu = torch.linspace(-5.0, 20.0, 8, dtype=torch.float64), torch.tensor(3.0).double()
    for tau in torch.tensor([0.5, 7.0]).double():
        values = {"mu": mu, "tau": tau}
        joint = log_joint(eight_schools.centered, SCHOOLS, theta=theta, **values)
        eta = {"theta_decentered": (theta - mu) / tau}
        other = log_joint(eight_schools.non_centered, SCHOOLS, **eta, **values)
        assert joint == pytest.approx(other - 8 * tau.log().item(), abs=1e-9)


def test_logistic_regression_from_its_curvature():
    pytest.importorskip("sklearn")
    found = POSTERIORS["logistic_regression"]()
    fit = logistic_regression.laplace(*found.args)

    def guide(design, y):
        pyro.sample("w", dist.MultivariateStudentT(8.0, fit.loc, fit.scale_tril))

    evidence = estimate_evidence(
        found.model, guide, *found.args, num_samples=20_000, chunk_size=5000
    )
    error = math.hypot(evidence.std_error, found.log_evidence_error)
    assert error < 0.05
    assert abs(evidence.log_evidence - found.log_evidence) < 4.5 * error


def test_the_guide_that_misses_a_mode_looks_right_and_is_wrong():
    for num_dims in (2, 20):
        found = POSTERIORS[f"two_modes_{num_dims}"]()
        guide = found.guide("one mode")
        evidence = estimate_evidence(found.model, guide, *found.args, num_samples=2000)
        masses = two_modes.log_masses(num_dims)
        assert abs(evidence.log_evidence - masses[1]) < 4.5 * evidence.std_error
        assert found.log_evidence - evidence.log_evidence > 4.5 * evidence.std_error
        assert evidence.flags == {}


@pytest.mark.long
def test_guides_are_trained():
    """The full-rank guide can be the posterior."""
    found = POSTERIORS["regression_1"]()
    guide = found.guide("full-rank", num_steps=300)
    elbo = pyro.infer.Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss(found.model, guide, *found.args)
    assert -loss == pytest.approx(found.log_evidence, abs=0.01)
