"""
Diagnose a fit by SVI with ArviZ
================================

SVI always ends with a loss and a guide. Is the guide close to the posterior? If the guide were the
posterior, all importance weights of its draws would be equal. If the weights have a heavy tail, the
guide misses part of the posterior. (A mode that no draw reaches stays undetected.) This tutorial
diagnoses fits of the eight schools model, of two regressions, and of an autoencoder. ::

    python tutorials/diagnose_with_arviz.py [--smoke] [--no-progress-bar]
        [--output diagnose_with_arviz.png]
"""

# %%
import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from figure_style import use_style
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo, simulation_based_calibration
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence

# %%
# Eight schools in two parameterisations
# --------------------------------------
#
# The data are the effects of coaching in eight schools, with their standard errors (Rubin 1981).
# The centred model draws each effect from N(mu, tau). The non-centred model draws a standardised
# effect and scales it. Both are the same model, but the posterior of the non-centred one is closer
# to a normal distribution.

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS = list("ABCDEFGH")


def centred() -> None:
    """theta ~ N(mu, tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, ERRORS), obs=EFFECTS)


def non_centred() -> None:
    """theta = mu + tau eta."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
        pyro.sample("effect", dist.Normal(theta, ERRORS), obs=EFFECTS)


#: The names of the fits in tables and figures.
MODELS = {"centred": centred, "non-centred": non_centred}
GUIDES = {"mean-field": AutoNormal, "full-rank": AutoMultivariateNormal}


def fit(
    model: Callable, guide: Callable, args: tuple[Any, ...], num_steps: int, hide: bool, name: str
) -> tuple[SVI, list[float]]:
    """Return a trained SVI and its losses."""
    elbo = Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(model, guide, optim, elbo)
    losses = [svi.step(*args) for _ in tqdm(range(num_steps), desc=name, disable=hide or None)]
    return svi, losses


def eight_schools(num_steps: int, num_samples: int, hide: bool) -> tuple[dict[str, float], Any]:
    """Return the Pareto k of each model and guide, and an export of the best fit."""
    pareto_k, best = {}, None
    for model_name, model in MODELS.items():
        for guide_name, guide in GUIDES.items():
            name = f"{model_name},\n{guide_name}"
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            bar_name = f"{model_name}, {guide_name}"
            svi, losses = fit(model, guide(model, init_scale=0.2), (), num_steps, hide, bar_name)
            found = diagnose(svi, num_samples=num_samples, losses=losses)
            print(f"\nEight schools, {bar_name} guide\n{found}")
            pareto_k[name] = found.pareto_k
            if pareto_k[name] == min(pareto_k.values()):
                best = from_pyro_svi(
                    svi,
                    num_samples=num_samples,
                    resample="psis",
                    coords={"school": SCHOOLS},
                )
    return pareto_k, best


# %%
# Two regressions, compared by leave-one-out
# ------------------------------------------
#
# The data come from a parabola. We fit a line and a parabola. ``loo`` multiplies the importance
# weights into the leave-one-out weights. The comparison therefore does not suffer from the error of
# the guide.


def regression(degree: int) -> Callable:
    """Return a polynomial regression with a normal prior for its coefficients."""

    def model(x: Tensor, y: Tensor) -> None:
        prior = dist.Normal(torch.zeros(degree + 1), 2.0).to_event(1)
        coefficients = pyro.sample("coefficients", prior)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = (coefficients * x[:, None] ** torch.arange(degree + 1)).sum(-1)
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def compare_regressions(num_steps: int, num_samples: int, hide: bool) -> Any:
    """Return ArviZ's comparison of both regressions."""
    import arviz as az

    pyro.set_rng_seed(0)
    x = torch.linspace(-2, 2, 40)
    y = 0.5 + x - 0.6 * x**2 + 0.5 * torch.randn(40)
    found = {}
    for name, degree in (("line", 1), ("parabola", 2)):
        pyro.clear_param_store()
        model = regression(degree)
        svi, _ = fit(model, AutoMultivariateNormal(model), (x, y), num_steps, hide, name)
        found[name] = loo(svi, x, y, num_samples=num_samples)
        print(f"\nLeave-one-out, {name}\n{found[name]}")
    return az.compare(found)


# %%
# Is the guide right on average?
# ------------------------------
#
# Simulation-based calibration fits the guide to data that are simulated from the model. It computes
# the fraction of the guide's draws that are below the true value. For a correct guide, these
# fractions are uniform.
#
# Here we fit a line with a mean-field guide. If the covariate is far from zero, the posterior of
# intercept and slope is correlated, and the guide is too narrow. If the covariate is centred, the
# guide is correct.


def calibrate(centre: bool, num_steps: int, num_simulations: int, hide: bool) -> np.ndarray:
    """Return the fractions of draws below the true slope."""
    x = torch.linspace(1, 3, 10)
    x = x - x.mean() if centre else x

    def line() -> None:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=torch.zeros(len(x)))

    pyro.set_rng_seed(0)
    found = simulation_based_calibration(
        line,
        lambda model, data: AutoNormal(model),
        num_simulations=num_simulations,
        num_steps=num_steps,
        progress_bar=not hide and sys.stderr.isatty(),
    )
    print(f"\nA line with {'a centred' if centre else 'an uncentred'} covariate\n{found}")
    return found.probabilities["slope"]


# %%
# Which digits does an encoder miss?
# ----------------------------------
#
# An autoencoder has a guide and a Pareto k for each digit. The encoder approximates the posterior
# worst for the digits with the largest Pareto k.


class VAE(nn.Module):
    """A model of grey digits. A pixel is the sum of 16 Bernoulli draws. z has 8 dims."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.Tanh(), nn.Linear(64, 64))

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("vae", self)
        with pyro.plate("digit", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pixels = dist.Binomial(16, logits=self.decoder(z), validate_args=False)
            pyro.sample("x", pixels.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        with pyro.plate("digit", len(x)):
            loc, log_scale = self.encoder(x / 16).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def worst_digits(num_steps: int, num_samples: int, hide: bool) -> tuple[Tensor, Tensor]:
    """Return the Pareto k of 300 digits, and the digits in decreasing order of k."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    train, test = digits[300:], digits[:300]
    vae = VAE()
    optim = pyro.optim.ClippedAdam({"lr": 3e-3})
    svi = SVI(vae.model, vae.guide, optim, ImportanceWeightedELBO(10, max_plate_nesting=1))
    for _ in tqdm(range(num_steps), desc="autoencoder", disable=hide or None):
        svi.step(train[torch.randint(len(train), (100,))])
    found = estimate_evidence(svi, test, num_samples=num_samples)
    print(f"\nAutoencoder\n{found}")
    return found.pareto_k, test[found.pareto_k.argsort(descending=True)]


def draw_figure(
    pareto_k: dict[str, float],
    fractions: dict[str, np.ndarray],
    digits: tuple[Tensor, Tensor],
    output: str,
) -> None:
    """Draw the Pareto k of all fits, the calibration, and the best and worst digits."""
    use_style()
    figure, grid = plt.subplots(2, 2, figsize=(11.5, 8.4))
    axes = grid.flat
    axes[0].barh(list(pareto_k), list(pareto_k.values()))
    axes[0].axvline(0.7, color="black", linewidth=0.8, linestyle="--")
    axes[0].invert_yaxis()
    axes[0].set(
        title="Eight schools: only non-centred\nmodels have k below 0.7",
        xlabel="Pareto k of the importance weights",
    )
    for name, values in fractions.items():
        axes[1].hist(values, bins=10, range=(0, 1), alpha=0.6, label=name)
    axes[1].set(
        title="A line: the guide is too narrow\nif the covariate is uncentred",
        xlabel="fraction of draws below the true slope",
        ylabel="simulations",
    )
    axes[1].legend(loc="upper center")
    axes[2].hist(digits[0].numpy(), bins=30)
    axes[2].axvline(0.7, color="black", linewidth=0.8, linestyle="--")
    axes[2].set(
        title="Autoencoder: most digits\nhave k above 0.7",
        xlabel="Pareto k of a digit",
        ylabel="digits",
    )
    shown = nn.functional.pad(torch.cat([digits[1][:8], digits[1][-8:]]).reshape(16, 8, 8), [1] * 4)
    axes[3].imshow(shown.reshape(4, 4, 10, 10).permute(0, 2, 1, 3).reshape(40, 40))
    axes[3].axhline(19.5, color="black", linewidth=0.8)
    axes[3].set(title="Most of the digits with\nthe largest k are twos", xticks=[])
    axes[3].set_yticks([9.5, 29.5], ["largest k", "smallest k"], rotation=90, va="center")
    axes[3].tick_params(length=0)
    axes[3].grid(False)
    figure.savefig(output)
    print(f"\nFigure: {output}")


def draw_with_arviz(data: Any, output: Path) -> None:
    """Draw the export with ArviZ."""
    import arviz as az

    is_old = hasattr(az, "plot_posterior")

    def trace() -> None:
        (az.plot_trace if is_old else az.plot_trace_dist)(data, var_names=["mu", "tau"])

    def forest() -> None:
        az.plot_forest(data, var_names=["theta"])

    def predictions() -> None:
        az.plot_ppc(data, num_pp_samples=50) if is_old else az.plot_ppc_dist(data)

    mu, tau, effect = "mu, points", "tau, points", "effect of coaching, points"
    plots: dict[Callable, list[tuple[str, str]]] = {
        trace: [(mu, "density"), ("draw", mu), (tau, "density"), ("draw", tau)],
        forest: [(effect, "school")],
        predictions: [(effect, "density")],
    }
    for plot, labels in plots.items():
        plot()
        for axis, (xlabel, ylabel) in zip(plt.gcf().axes, labels, strict=False):
            axis.set(xlabel=xlabel, ylabel=ylabel)
        path = output.with_name(f"{output.stem}_{plot.__name__}{output.suffix}")
        plt.savefig(path, bbox_inches="tight")
        plt.close()
        print(f"Figure: {path}")


def main() -> None:
    """Fit, diagnose, print and draw."""
    parser = argparse.ArgumentParser(description="Diagnoses fits by SVI.")
    parser.add_argument("--smoke", action="store_true", help="few steps, to test the script")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="diagnose_with_arviz.png", help="path of the figure")
    arguments = parser.parse_args()
    hide = arguments.no_progress_bar
    num_steps, num_samples, num_simulations = 2000, 4000, 200
    if arguments.smoke:
        num_steps, num_samples, num_simulations = 20, 50, 10
    # The diagnoses and the figure show the Pareto k. Other warnings come from ArviZ.
    warnings.simplefilter("ignore")
    pareto_k, export = eight_schools(num_steps, num_samples, hide)
    print(f"\n{compare_regressions(num_steps, num_samples, hide)}")
    fractions = {
        "uncentred covariate": calibrate(False, num_steps, num_simulations, hide),
        "centred covariate": calibrate(True, num_steps, num_simulations, hide),
    }
    digits = worst_digits(num_steps, num_samples, hide)
    draw_figure(pareto_k, fractions, digits, arguments.output)
    draw_with_arviz(export, Path(arguments.output))


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/thumbnails/diagnose_with_arviz.png"

# %%
# Findings
# --------
#
# - The ELBO of a fit does not show whether you can trust the guide. The Pareto k of its importance
#   weights does. Here the non-centred model with a full-rank guide is the fit to resample and
#   export.
# - ``loo`` prefers the parabola. It reports the difference and its standard error.
# - A guide that is too narrow for each coefficient can still have the right mean. Calibration
#   distinguishes a wrong width from a bias.
# - An encoder is not equally good for all data. Do not trust the evidence of digits with a large
#   Pareto k.
