"""Diagnostics of fits whose marked discrete sites are summed out."""

from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo, simulation_based_calibration
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence, gradient_diagnostics
from tests.discrete_models import (
    MODELS,
    NOISE,
    PATHS,
    PRIOR,
    PROBS,
    PROPOSAL,
    X,
    chosen,
    exact_discrete,
    grid,
    guide,
    guide_of_rows,
    log_joint,
    log_paths,
    log_rows,
    mixture,
    posterior,
    rows,
)
from tests.statistics import assert_mean

pytestmark = [
    pytest.mark.filterwarnings("ignore:Plate 'data' holds"),
    pytest.mark.usefixtures("float64"),
]
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)
CHUNKS = pytest.mark.parametrize("chunk_size", [None, 1])


def tensor(found, group, name):
    return torch.as_tensor(found[group][name].values[0]).double()


def pointwise(found):
    return torch.tensor(getattr(found, "loo_i", getattr(found, "elpd_i", None)).values)


def assert_weighted_mean(found, values, expected):
    """The mean under the importance weights is ``expected`` within 4.5 standard errors."""
    weight = tensor(found, "sample_stats", "log_weight").softmax(0)
    weight = weight.reshape(-1, *[1] * (values.dim() - 1))
    error = (weight * (values - expected)).square().sum(0).sqrt()
    assert (((weight * values).sum(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.1).all()


@EVERY_MODEL
@CHUNKS
def test_weights_and_likelihoods_have_the_discrete_sites_summed(name, chunk_size):
    found = from_pyro_svi(MODELS[name], guide, X, num_samples=30, chunk_size=chunk_size)
    means = tensor(found, "posterior", "means")
    log_q = PROPOSAL.log_prob(means).sum(-1)
    log_p = PRIOR.log_prob(means).sum(-1) + log_joint(name, means)
    log_weight = tensor(found, "sample_stats", "log_weight")
    torch.testing.assert_close(log_weight, log_p - log_q)
    if name == "mixture":
        log_likelihood = tensor(found, "log_likelihood", "x")
        torch.testing.assert_close(log_likelihood, log_rows(means).logsumexp(-1))
        assert found["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    else:
        assert list(found["log_likelihood"]) == ["x_0"]
        joint = tensor(found, "log_likelihood", "x_0")
        torch.testing.assert_close(joint, log_joint(name, means))


@EVERY_MODEL
@pytest.mark.parametrize(("num", "chunk_size"), [(4000, None), (4000, 1500), (100, 1)])
def test_discrete_sites_are_drawn_from_their_posterior(name, num, chunk_size):
    found = from_pyro_svi(
        MODELS[name], guide, X, num_samples=num, chunk_size=chunk_size, prior=False
    )
    names = [f"z_{t}" for t in range(len(X))]
    if name == "mixture":
        draws = tensor(found, "posterior", "a")
        assert found["posterior"]["a"].dims == ("chain", "draw", "data")
    else:
        draws = torch.stack([tensor(found, "posterior", site) for site in names], -1)
    assert_weighted_mean(found, draws, exact_discrete(name))


def test_states_of_a_chain_are_drawn_jointly():
    found = from_pyro_svi(MODELS["hmm"], guide, X, num_samples=4000)
    draws = torch.stack([tensor(found, "posterior", f"z_{t}") for t in range(len(X))], -1)
    points, weight = posterior("hmm")
    is_same = (PATHS[:, 1:] == PATHS[:, :-1]).double()
    expected = weight @ log_paths(points).softmax(-1) @ is_same
    assert_weighted_mean(found, (draws[:, 1:] == draws[:, :-1]).double(), expected)


@CHUNKS
def test_predictions_and_deterministic_sites_have_the_discrete_draws(chunk_size):
    found = from_pyro_svi(mixture, guide, X, 1e-3, num_samples=40, chunk_size=chunk_size)
    means = tensor(found, "posterior", "means")
    loc = chosen(means.unsqueeze(-2), tensor(found, "posterior", "a"))
    torch.testing.assert_close(tensor(found, "posterior", "loc"), loc)
    drawn = tensor(found, "posterior_predictive", "x")
    torch.testing.assert_close(drawn, loc, rtol=0, atol=6e-3)


def test_sites_in_a_plate_are_drawn_jointly_with_a_site_outside():
    transitions = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    @config_enumerate
    def model(x):
        means = pyro.sample("means", PRIOR.to_event(1))
        a = pyro.sample("a", dist.Categorical(PROBS))
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Categorical(transitions[a]))
            pyro.sample("x", dist.Normal(chosen(means, b), NOISE), obs=x)

    found = from_pyro_svi(model, guide, X, num_samples=4000, prior=False)
    points, log_prior = grid()
    of_b = dist.Normal(points[:, None, None], NOISE).log_prob(X[:, None, None]) + transitions.log()
    of_a = of_b.logsumexp(-1).sum(1) + PROBS.log() + log_prior[:, None]  # (points, a)
    weight = of_a.flatten().softmax(0).reshape(of_a.shape)
    expected = (weight.unsqueeze(1) * of_b.softmax(-1)[..., 1]).sum((0, 2))
    assert_weighted_mean(found, tensor(found, "posterior", "a"), weight[:, 1].sum())
    assert_weighted_mean(found, tensor(found, "posterior", "b"), expected)
    assert found["log_likelihood"]["x"].dims == ("chain", "draw")


def test_discrete_sites_can_be_left_out():
    found = from_pyro_svi(mixture, guide, X, num_samples=10, discrete_sites=False)
    assert set(found["posterior"]) == {"means", "loc"}


def test_local_latents_and_discrete_sites_are_resampled_together():
    found = from_pyro_svi(rows, guide_of_rows, X, num_samples=4000, resample="psis", prior=False)
    log_joint = dist.Normal(2.0 * torch.arange(2.0), 1.25**0.5).log_prob(X[:, None]) + PROBS.log()
    # z is X / 1.25 if a = 0, and (X - 2) / 1.25 if a = 1.
    expected = (log_joint.softmax(-1)[:, 1] * (X - 2) / 1.25).expand(4000, -1)
    found = tensor(found, "posterior", "z") * tensor(found, "posterior", "a")
    evidence = estimate_evidence(rows, guide_of_rows, X, num_samples=4000)
    # Resampling adds its variance to that of the weights.
    share = evidence.ess.min() / 4000
    assert_mean(found - expected, 0.0, num_errors=4.5 * (1 + 1 / share) ** 0.5)


def test_a_subsampled_plate_is_visited_in_blocks():
    @config_enumerate
    def model():
        means = pyro.sample("means", PRIOR.to_event(1))
        switch = pyro.sample("switch", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(3 * switch, 1.0), obs=torch.tensor(1.0))
        with pyro.plate("data", len(X), subsample_size=2) as index:
            a = pyro.sample("a", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(chosen(means, a), NOISE), obs=X[index])

    found = from_pyro_svi(model, guide, num_samples=4000, prior=False)
    assert_weighted_mean(found, tensor(found, "posterior", "a"), exact_discrete("mixture"))
    odds = torch.exp(torch.tensor(-2.0 + 0.5))  # of N(1; 3, 1) to N(1; 0, 1)
    assert_weighted_mean(found, tensor(found, "posterior", "switch"), odds / (1 + odds))
    means = tensor(found, "posterior", "means")
    log_likelihood = tensor(found, "log_likelihood", "x")
    torch.testing.assert_close(log_likelihood, log_rows(means).logsumexp(-1))


def test_the_likelihood_of_a_sum_is_given_its_continuous_sites():
    @config_enumerate
    def model():
        a = pyro.sample("a", dist.Categorical(PROBS))
        z = pyro.sample("z", dist.Normal(2.0 * a, 1.0))
        pyro.sample("x", dist.Normal(z + a, 1.0), obs=torch.tensor(1.0))

    found = from_pyro_svi(
        model, lambda: pyro.sample("z", dist.Normal(0.7, 1.2)), num_samples=20, prior=False
    )
    z = tensor(found, "posterior", "z")[:, None]
    a = torch.arange(2.0)
    of_z = PROBS.log() + dist.Normal(2.0 * a, 1.0).log_prob(z)
    of_x = dist.Normal(z + a, 1.0).log_prob(torch.tensor(1.0))
    expected = (of_z + of_x).logsumexp(-1) - of_z.logsumexp(-1)
    torch.testing.assert_close(tensor(found, "log_likelihood", "x"), expected)


def test_masked_observations_of_a_sum_are_not_counted():
    mask = torch.tensor([True, False, True, True, False])

    @config_enumerate
    def model(x):
        means = pyro.sample("means", PRIOR.to_event(1))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            a = pyro.sample("a", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(chosen(means, a), NOISE), obs=x)

    found = loo(model, guide, X, num_samples=500)
    assert found["n_data_points"] == 3


def test_loo_sums_over_the_discrete_sites():
    points, log_prior = grid(200)
    log_likelihood = log_rows(points).logsumexp(-1)
    total = log_likelihood.sum(-1, keepdim=True)
    without = (log_prior[:, None] + total - log_likelihood).logsumexp(0)
    exact = (log_prior[:, None] + total).logsumexp(0) - without
    found = [pointwise(loo(mixture, guide, X, num_samples=2000)) for _ in range(20)]
    assert_mean(torch.stack(found), exact)


@pytest.mark.long
def test_loo_integrates_over_local_latents_and_discrete_sites():
    @config_enumerate
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            a = pyro.sample("a", dist.Categorical(PROBS))
            pyro.sample("x", dist.Normal(z + 2.0 * a, 0.5), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(-0.5, 0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - 0.8, 1.4))

    mu = torch.linspace(-7, 7, 2000)[:, None, None]
    parts = dist.Normal(mu + 2.0 * torch.arange(2.0), 1.25**0.5).log_prob(X[:, None])
    log_likelihood = (parts + PROBS.log()).logsumexp(-1)
    total = dist.Normal(0.0, 1.0).log_prob(mu[..., 0]) + log_likelihood.sum(-1, keepdim=True)
    exact = total.logsumexp(0) - (total - log_likelihood).logsumexp(0)
    options = {"num_samples": 150, "num_local_samples": 200}
    found = [pointwise(loo(model, guide, X, **options)) for _ in range(6)]
    assert_mean(torch.stack(found), exact)


def test_diagnose_judges_the_continuous_sites():
    found = diagnose(mixture, guide, X, num_samples=2000)
    assert found.pareto_k < 0.7
    assert set(found.predictive_p_values) == {"x"}
    assert found.points == ()


def test_gradient_diagnostics_take_marked_sites():
    def guide_with_params(x):
        pyro.sample("means", dist.Normal(pyro.param("loc", torch.zeros(2)), 0.8).to_event(1))

    elbos = {"iwae": ImportanceWeightedELBO(3), "dreg": ImportanceWeightedELBO(3, gradient="dreg")}
    found = gradient_diagnostics(mixture, guide_with_params, X, elbos=elbos, num_repeats=20)
    assert found.guide["dreg"].std > 0


@pytest.mark.parametrize("vectorize", [True, False])
def test_calibration_ranks_draws_of_discrete_sites(vectorize):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 2 * a, 1.0), obs=torch.tensor(0.0))

    def make_guide(model, data):
        x = data["x"].unsqueeze(-1)
        loc = 2.0 * torch.arange(2.0)
        logits = dist.Normal(loc, 2**0.5).log_prob(x) + torch.tensor([0.6, 0.4]).log()
        parts = dist.Normal((x - loc) / 2, 0.5**0.5)

        def guide():
            with pyro.plate("simulations", len(x)) if vectorize else nullcontext():
                pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))

        return guide

    num = 200 if vectorize else 30
    found = simulation_based_calibration(
        model, make_guide, num_simulations=num, num_samples=20, num_steps=0, vectorize=vectorize
    )
    assert found.uniformity_p_values.keys() == {"z", "a"}
    for p_values in (found.uniformity_p_values, found.symmetry_p_values):
        assert all(p > 1e-3 for p in p_values.values())


def test_calibration_fits_guides_with_the_sites_summed_out():
    def make_guide(model, data):
        def fitted():
            shape = data["x"].shape
            loc = pyro.param("loc", torch.zeros(shape))
            with pyro.plate("simulations", shape[0]):
                pyro.sample("z", dist.Normal(loc, 0.5))

        return fitted

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + 0.1 * a, 0.5), obs=torch.tensor(0.0))

    found = simulation_based_calibration(
        model, make_guide, num_simulations=100, num_samples=30, num_steps=200
    )
    assert found.symmetry_p_values["z"] > 1e-3
    assert found.symmetry_p_values["a"] > 1e-3
