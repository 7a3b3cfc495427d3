"""Comparisons of models, against conjugate regression and brute-force simulation."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from scipy.special import expit, softmax

from pyro_ext.diagnostics import compare_models, plot_model_comparison
from pyro_ext.infer import Evidence, annealed_importance_sampling, estimate_evidence
from tests.models import GlobalNormal, NormalNormal

X = torch.linspace(-1.5, 2.5, 12, dtype=torch.float64)
NOISE = 0.5


class Polynomial:
    """w ~ N(0, 1) for the coefficients up to an order, y | w ~ N(sum_i w_i x^i, NOISE)."""

    def __init__(self, order, x, y, widening=1.0):
        self.y = y
        self.design = x[:, None] ** torch.arange(order + 1)
        precision = self.design.T @ self.design / NOISE**2 + torch.eye(order + 1, dtype=x.dtype)
        covariance = torch.linalg.inv(precision)
        self.loc = covariance @ self.design.T @ y / NOISE**2
        self.covariance = widening * covariance

    def model(self):
        prior = dist.Normal(self.y.new_zeros(()), 1.0).expand([self.design.shape[1]]).to_event(1)
        w = pyro.sample("w", prior)
        with pyro.plate("data", len(self.y)):
            loc = sum(w[..., i] * column for i, column in enumerate(self.design.T))
            pyro.sample("y", dist.Normal(loc, NOISE), obs=self.y)

    def guide(self):
        pyro.sample("w", dist.MultivariateNormal(self.loc, self.covariance))

    def log_evidence(self):
        eye = NOISE**2 * torch.eye(len(self.y), dtype=self.y.dtype)
        covariance = self.design @ self.design.T + eye
        return dist.MultivariateNormal(torch.zeros_like(self.y), covariance).log_prob(self.y).item()


def simulated(seed, order=2):
    """Data of a polynomial, whose coefficients are 1 or -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(-1.5, 1.5, 60, dtype=torch.float64)
    signs = torch.randint(2, (order + 1,), generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(60, generator=generator, dtype=torch.float64)
    return x, x[:, None] ** torch.arange(order + 1) @ signs + NOISE * noise


def polynomials(seed, order=2, **options):
    x, y = simulated(seed, order)
    return {f"order {i}": Polynomial(i, x, y, **options) for i in range(5)}


def pairs(programs):
    return {name: (p.model, p.guide) for name, p in programs.items()}


compare_evidences = partial(compare_models, with_loo=False)


@pytest.mark.parametrize("seed", range(3))
def test_recovers_the_order_of_a_polynomial(seed):
    found = compare_evidences(pairs(polynomials(seed)), num_samples=100)
    assert found.index[0] == "order 2"
    assert found.index[-2:].isin(["order 0", "order 1"]).all()


@pytest.mark.slow
def test_recovers_18_of_20_orders():
    hits = 0
    for seed in range(20):
        order = seed % 5
        programs = polynomials(seed, order, widening=1.3)
        hits += compare_evidences(pairs(programs)).index[0] == f"order {order}"
    assert hits >= 18


def test_scopes_keep_parameters_apart():
    """Guides whose parameters have the same names, but not the same shapes."""
    programs = polynomials(0, widening=1.2)
    svis, scopes = {}, {}
    for name in ("order 1", "order 2"):
        start = programs[name]

        def guide(loc=start.loc, covariance=start.covariance):
            loc, covariance = pyro.param("loc", loc), pyro.param("covariance", covariance)
            pyro.sample("w", dist.MultivariateNormal(loc, covariance))

        svis[name] = SVI(start.model, guide, pyro.optim.Adam({"lr": 1e-6}), Trace_ELBO())
        with pyro.get_param_store().scope() as scopes[name]:
            svis[name].step()
    found = compare_models(svis, scopes=scopes, num_samples=500)
    exact = np.array([programs[name].log_evidence() for name in found.index])
    assert ((found["log_evidence"] - exact).abs() <= 4.5 * found["std_error"]).all()
    assert found["elpd_loo"].diff().iloc[1] < 0
    assert list(found.index) == ["order 2", "order 1"]


def test_agrees_with_the_evidence_of_conjugate_regression():
    """A guide with too large a spread, so that the weights vary."""
    programs = polynomials(1, widening=1.5)
    found = compare_evidences(pairs(programs), num_samples=4000, interval=1 - 1e-5)
    exact = np.array([programs[name].log_evidence() for name in found.index])
    errors = found["log_evidence"] - exact
    assert (errors.abs() < 4.5 * found["std_error"]).all()
    assert ((errors / found["std_error"]) ** 2).mean() > 0.05  # the errors are not too large
    assert (found["log_evidence"].diff().dropna() < 0).all()
    factors = found["log_bayes_factor"] - (exact - exact[0])
    assert (factors.abs() <= 4.5 * found["log_bayes_factor_std_error"]).all()
    probabilities = softmax(exact)
    assert (found["probability_low"] <= probabilities).all()
    assert (probabilities <= found["probability_high"]).all()
    assert found["probability"].sum() == pytest.approx(1.0)
    assert (found["flags"] == "").all()


TEMPLATE = estimate_evidence(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), None, num_samples=50)


def given(log_evidence, std_error, **options):
    """An evidence with given values."""
    log_evidence, std_error = (torch.as_tensor(x, dtype=X.dtype) for x in (log_evidence, std_error))
    fields = {"log_evidence": log_evidence, "std_error": std_error, **options}
    return Evidence(**vars(TEMPLATE) | fields)


def test_interval_of_two_models_is_that_of_their_log_odds():
    models = {"a": given(-3.0, 0.3), "b": given(-2.0, 0.4)}
    prior = {"a": 0.7, "b": 0.3}
    found = compare_models(models, prior_probabilities=prior, interval=0.9).loc["a"]
    log_odds = -1.0 + math.log(7 / 3)
    # 1.6449 is the 95 % quantile of a normal; the simulated quantiles have an error of 0.002
    assert found["probability"] == pytest.approx(expit(log_odds))
    assert found["probability_low"] == pytest.approx(expit(log_odds - 1.6449 * 0.5), abs=0.009)
    assert found["probability_high"] == pytest.approx(expit(log_odds + 1.6449 * 0.5), abs=0.009)


def repeated(scale):
    """400 estimates of one evidence: z ~ N(0, scale), x | z ~ N(z, 1) at x = 2, 40 draws each."""
    variance = 1 / (1 + scale**-2)

    def model():
        with pyro.plate("repeats", 400):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=2 * X.new_ones(()))

    def guide():
        with pyro.plate("repeats", 400):
            pyro.sample("z", dist.Normal(2 * variance, 1.7 * X.new_tensor(variance).sqrt()))

    exact = dist.Normal(X.new_zeros(()), math.hypot(scale, 1)).log_prob(2 * X.new_ones(()))
    return estimate_evidence(model, guide, num_samples=40), exact


@pytest.mark.filterwarnings("ignore:estimate_evidence. Pareto k")  # of some of the repeats
def test_interval_is_that_of_repeated_comparisons():
    """The true probability lies in 90 % of the intervals, up to 4.5 standard errors."""
    (narrow, of_narrow), (wide, of_wide) = repeated(1.0), repeated(3.0)
    exact = torch.sigmoid(of_wide - of_narrow).item()
    hits = []
    for one, other in zip(wide.log_evidence, narrow.log_evidence, strict=True):
        at = len(hits)
        models = {"wide": given(one, wide.std_error[at]), "b": given(other, narrow.std_error[at])}
        row = compare_models(models, interval=0.9).loc["wide"]
        hits.append(row["probability_low"] <= exact <= row["probability_high"])
    assert abs(np.mean(hits) - 0.9) <= 4.5 * math.sqrt(0.9 * 0.1 / 400), np.mean(hits)


@pytest.mark.filterwarnings("ignore:Plate 'data' holds all the data")
def test_takes_every_kind_of_program():
    programs = GlobalNormal(X)
    svi = SVI(programs.model, programs.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    pyro.param("another", torch.zeros(()))  # a store with parameters counts as trained
    evidence = estimate_evidence(programs.model, programs.guide, num_samples=50)
    annealed = annealed_importance_sampling(programs.model, programs.guide, num_temperatures=2)

    class Result:
        """A result of a sampler, with its evidence."""

    result = Result()
    result.evidence = evidence
    models = {
        "svi": svi,
        "pair": (programs.model, programs.guide),
        "model": programs.model,
        "no guide": (programs.model, None),
        "evidence": evidence,
        "annealed": annealed,
        "result": result,
    }
    found = compare_models(models, num_samples=200)
    exact = programs.log_evidence().item()
    assert ((found["log_evidence"] - exact).abs() <= 4.5 * found["std_error"] + 1e-9).all()
    assert found["elpd_loo"].notna().to_dict() == {
        name: name in ("svi", "pair") for name in found.index
    }


def test_elpd_is_that_of_the_posteriors_without_a_point():
    programs = GlobalNormal(X)
    models = {"pair": (programs.model, programs.guide)}
    found = compare_models(models, num_samples=4000, chunk_size=4000).loc["pair"]
    others = dist.Normal((X.sum() - X) / len(X), math.sqrt(1 + 1 / len(X)))
    exact = others.log_prob(X)
    # In 20 runs, the standard deviation of the estimate is 0.03, and that of its error is 0.02.
    assert found["elpd_loo"] == pytest.approx(exact.sum().item(), abs=0.15)
    assert found["se"] == pytest.approx((12 * exact.var(correction=0)).sqrt().item(), abs=0.1)


def test_passes_arguments_on():
    def model(x, *, scale):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    programs = {"a": model}
    by_call = compare_models(programs, X, scale=2.0)
    pyro.set_rng_seed(0)
    by_name = compare_models(
        programs, model_args=(X,), model_kwargs={"scale": 2.0}, num_samples=1000
    )
    exact = dist.Normal(X.new_zeros(()), math.sqrt(5)).log_prob(X).sum().item()
    for found in (by_call, by_name):
        row = found.loc["a"]
        assert abs(row["log_evidence"] - exact) < 4.5 * row["std_error"]  # all data points
        assert (row["probability"], row["log_bayes_factor_std_error"]) == (1.0, 0.0)


def test_elpd_is_nan_where_it_is_not_defined():
    programs = NormalNormal(X)
    with pytest.warns(UserWarning, match=r"elpd_loo of model 'vae' is NaN.*no global latent"):
        found = compare_models({"vae": (programs.model, programs.guide)}, num_samples=10)
    assert math.isnan(found.loc["vae", "elpd_loo"])


def test_names_the_flags():
    evidence = given(-2.0, 0.7, ess=torch.tensor(2.0))
    found = compare_models({"doubtful": evidence, "good": given(-3.0, 0.1)})
    assert found["flags"].to_dict() == {"doubtful": "ess, std_error", "good": ""}


def test_rows_in_blocks():
    whole, in_blocks = NormalNormal(X, exact_guide=True), NormalNormal(X, 4, exact_guide=True)
    pairs = {"subsampled": (in_blocks.model, in_blocks.guide)}
    settings = {"data_plate": "data", "batch_size": 4}
    found = compare_evidences(pairs, evidence_kwargs=settings)
    exact = whole.log_evidence().sum().item()
    assert found.loc["subsampled", "log_evidence"] == pytest.approx(exact)
    with pytest.raises(ValueError, match=r"model 'alone' subsamples plate 'data'.* pass a guide"):
        compare_evidences({"alone": in_blocks.model}, evidence_kwargs=settings)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    models = {"second": given(-3.0, 0.1), "best": given(-2.0, 0.7)}
    ax = plot_model_comparison(compare_models(models))
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["best (0.73)", "second (0.27)"]
    assert [container.lines[0].get_color() for container in ax.containers] == ["tab:red", "black"]
    assert ax.yaxis_inverted()
    assert ax.lines[-1].get_xdata() == [-2.0, -2.0]
    matplotlib.pyplot.close(ax.figure)
