"""
Did it work? Diagnosing a fit by SVI with ArviZ
===============================================

SVI always ends with a number and a guide. Whether the guide is near the posterior is another
question. If it were the posterior, the importance weights of its draws would all be equal; where
they have a heavy tail, it misses something. (A mode that no draw has reached stays unseen.) This
tutorial asks eight schools, two regressions, and an autoencoder. ::

    python tutorials/diagnose_with_arviz.py [--smoke] [--no-progress-bar]
        [--output diagnose_with_arviz.png]
"""

# %%
import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ext.diagnostics import diagnose, from_pyro_svi, loo, simulation_based_calibration
from pyro_ext.infer import ImportanceWeightedELBO, estimate_evidence

# %%
# Eight schools, two ways
# -----------------------
#
# The effects of coaching in eight schools, with their standard errors (Rubin 1981). The centred
# model draws each effect from N(mu, tau). The non-centred one draws a standardised effect and
# scales it: the same model, with a posterior that is nearer to a normal distribution.

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


def fit(
    model: Callable, guide: Callable, args: tuple[Any, ...], num_steps: int, hide: bool, name: str
) -> tuple[SVI, list[float]]:
    """An SVI that has been stepped, and its losses."""
    elbo = Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / num_steps)})
    svi = SVI(model, guide, optim, elbo)
    losses = [svi.step(*args) for _ in tqdm(range(num_steps), desc=name, disable=hide)]
    return svi, losses


def eight_schools(num_steps: int, num_samples: int, hide: bool) -> tuple[dict[str, float], Any]:
    """Pareto k by model and guide, and the export of the best."""
    pareto_k, best = {}, None
    for model in (centred, non_centred):
        for kind in (AutoNormal, AutoMultivariateNormal):
            name = f"{model.__name__}, {kind.__name__}"
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            svi, losses = fit(model, kind(model, init_scale=0.2), (), num_steps, hide, name)
            found = diagnose(svi, num_samples=num_samples, losses=losses)
            print(f"\n{name}\n{found}")
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
# A line and a parabola for data that come from a parabola. ``loo`` folds the importance weights
# into the leave-one-out weights, so that the comparison does not suffer from the guide's error.


def regression(degree: int) -> Callable:
    """A polynomial with a normal prior for its coefficients."""

    def model(x: Tensor, y: Tensor) -> None:
        prior = dist.Normal(torch.zeros(degree + 1), 2.0).to_event(1)
        coefficients = pyro.sample("coefficients", prior)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            mean = (coefficients * x[:, None] ** torch.arange(degree + 1)).sum(-1)
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return model


def compare_regressions(num_steps: int, num_samples: int, hide: bool) -> Any:
    """ArviZ's table of both."""
    import arviz as az

    pyro.set_rng_seed(0)
    x = torch.linspace(-2, 2, 40)
    y = 0.5 + x - 0.6 * x**2 + 0.5 * torch.randn(40)
    found = {}
    for name, degree in (("line", 1), ("parabola", 2)):
        pyro.clear_param_store()
        model = regression(degree)
        svi, _ = fit(model, AutoMultivariateNormal(model), (x, y), num_steps, hide, name)
        found[name] = loo(svi, model_args=(x, y), num_samples=num_samples)
        print(f"\n{name}\n{found[name]}")
    return az.compare(found)


# %%
# Is the guide right on average?
# ------------------------------
#
# Simulation-based calibration fits the guide to data that the model simulates, and looks where the
# truth lies among the guide's draws. A mean-field guide for a line is too narrow where the
# covariate is far from zero, because intercept and slope are then correlated; it is right when
# the covariate is centred.


def calibrate(centre: bool, num_steps: int, num_simulations: int, hide: bool) -> np.ndarray:
    """The fractions of draws below the true slope."""
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
        progress_bar=not hide,
    )
    print(f"\n{'centred' if centre else 'uncentred'} covariate\n{found}")
    return found.probabilities["slope"]


# %%
# Which digits does an encoder miss?
# ----------------------------------
#
# An autoencoder has a guide for each digit, and a Pareto k for each: those with the largest are the
# ones whose posterior the encoder describes worst.


class VAE(nn.Module):
    """Grey digits as sums of 16 Bernoulli draws a pixel, with 8 latent dims."""

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
    """The Pareto k of 300 digits, and the digits in the order of it, largest first."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    digits = torch.tensor(load_digits().data, dtype=torch.float32)
    train, test = digits[300:], digits[:300]
    vae = VAE()
    optim = pyro.optim.ClippedAdam({"lr": 3e-3})
    svi = SVI(vae.model, vae.guide, optim, ImportanceWeightedELBO(10, max_plate_nesting=1))
    for _ in tqdm(range(num_steps), desc="autoencoder", disable=hide):
        svi.step(train[torch.randint(len(train), (100,))])
    found = estimate_evidence(vae.model, vae.guide, test, num_samples=num_samples)
    print(f"\nautoencoder: {found}")
    return found.pareto_k, test[found.pareto_k.argsort(descending=True)]


def draw_figure(
    pareto_k: dict[str, float],
    fractions: dict[str, np.ndarray],
    digits: tuple[Tensor, Tensor],
    output: str,
) -> None:
    """Four panels."""
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    axes[0].barh(list(pareto_k), list(pareto_k.values()))
    axes[0].axvline(0.7, color="black", linewidth=0.8, linestyle="--")
    axes[0].set(title="Eight schools", xlabel="Pareto k of the joint weights")
    for name, values in fractions.items():
        axes[1].hist(values, bins=10, range=(0, 1), alpha=0.6, label=name)
    axes[1].set(title="Mean-field guide of a line", xlabel="fraction of draws below the true slope")
    axes[1].legend()
    axes[2].hist(digits[0].numpy(), bins=30)
    axes[2].axvline(0.7, color="black", linewidth=0.8, linestyle="--")
    axes[2].set(title="Autoencoder", xlabel="Pareto k of a digit")
    shown = nn.functional.pad(torch.cat([digits[1][:8], digits[1][-8:]]).reshape(16, 8, 8), [1] * 4)
    axes[3].imshow(shown.reshape(4, 4, 10, 10).permute(0, 2, 1, 3).reshape(40, 40), cmap="gray_r")
    axes[3].axhline(19.5, color="black", linewidth=0.8)
    axes[3].set(title="Largest k above, smallest below", xticks=[], yticks=[])
    figure.savefig(output, dpi=120)
    print(f"\nFigure: {output}")


def draw_with_arviz(data: Any, output: Path) -> None:
    """What ArviZ draws of an export."""
    import arviz as az

    plots: dict[str, Callable] = {}
    if hasattr(az, "plot_posterior"):
        plots["trace"] = lambda: az.plot_trace(data, var_names=["mu", "tau"])
        plots["forest"] = lambda: az.plot_forest(data, var_names=["theta"])
        plots["predictions"] = lambda: az.plot_ppc(data, num_pp_samples=50)
    else:
        plots["trace"] = lambda: az.plot_trace_dist(data, var_names=["mu", "tau"])
        plots["forest"] = lambda: az.plot_forest(data, var_names=["theta"])
        plots["predictions"] = lambda: az.plot_ppc_dist(data)
    for name, plot in plots.items():
        plot()
        path = output.with_name(f"{output.stem}_{name}{output.suffix}")
        plt.savefig(path, dpi=120, bbox_inches="tight")
        plt.close()
        print(f"Figure: {path}")


def main() -> None:
    """Fits, diagnoses, prints and draws."""
    parser = argparse.ArgumentParser(description="Diagnoses fits by SVI.")
    parser.add_argument("--smoke", action="store_true", help="few steps, to see that it runs")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="diagnose_with_arviz.png", help="where the figure goes")
    arguments = parser.parse_args()
    hide = arguments.no_progress_bar
    num_steps, num_samples, num_simulations = 2000, 4000, 200
    if arguments.smoke:
        num_steps, num_samples, num_simulations = 20, 50, 10
    # The verdicts and the figure show the Pareto k; the rest is ArviZ's with newer libraries.
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

# %%
# What was learnt
# ---------------
#
# - The ELBO of a fit does not say whether to doubt it; the Pareto k of its weights does. The
#   non-centred model with a full-rank guide is the one to resample and export.
# - ``loo`` prefers the parabola, and says by how much and how sure that is.
# - A guide that is too narrow for each coefficient alone can still have the right mean:
#   calibration tells width from bias.
# - An encoder is not equally good for all data. The digits with a large Pareto k are where its
#   evidence should not be trusted.
