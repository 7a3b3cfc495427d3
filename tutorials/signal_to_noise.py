"""
Signal and noise in the gradients of tighter bounds
====================================================

A tighter bound can have a worse gradient. Rainforth et al. (2018) showed that the guide's gradient
under the importance-weighted bound loses its signal faster than its noise as K grows: the ratio
falls as K^-1/2. Doubly reparameterised gradients (Tucker et al. 2019) turn that around, to K^1/2.
Here both are seen on a model with a known posterior, together with a case in which they do worse;
then ``gradient_diagnostics`` measures estimators on an autoencoder, early and late in training. ::

    python tutorials/signal_to_noise.py [--smoke] [--no-progress-bar]
        [--output signal_to_noise.png]
"""

# %%
import argparse
import math

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_ext.infer import (
    CombinedELBO,
    GradientDiagnostics,
    ImportanceWeightedELBO,
    MultiplyImportanceWeightedELBO,
    PartiallyImportanceWeightedELBO,
    gradient_diagnostics,
)

RULES = ("pathwise", "stl", "dreg")

# %%
# A normal posterior
# ------------------
#
# The target is N(loc, scale), the guide N(shift, 1), and the gradient is that by the shift. A plate
# of independent replicates gives as many draws of the gradient in one step.


def gradients(
    rule: str, num_particles: int, shift: float, target: tuple[float, float], num_repeats: int
) -> Tensor:
    """Independent draws of the gradient of the bound by the guide's location."""
    pyro.set_rng_seed(num_particles)
    loc = torch.full((num_repeats,), shift, dtype=torch.float64, requires_grad=True)

    def model() -> None:
        with pyro.plate("replicates", num_repeats):
            pyro.sample("z", dist.Normal(loc.new_tensor(target[0]), target[1]))

    def guide() -> None:
        with pyro.plate("replicates", num_repeats):
            pyro.sample("z", dist.Normal(loc, 1.0))

    elbo = ImportanceWeightedELBO(num_particles, gradient=rule, max_plate_nesting=1)
    (gradient,) = torch.autograd.grad(-elbo.differentiable_loss(model, guide), loc)
    return gradient


def ratios_near(sizes: tuple[int, ...], num_repeats: int) -> dict[str, list[float]]:
    """Signal-to-noise by rule, near the posterior: target N(0, 0.8), guide N(0.2, 1)."""
    ratios: dict[str, list[float]] = {rule: [] for rule in RULES}
    for K in sizes:
        draws = {rule: gradients(rule, K, 0.2, (0.0, 0.8), num_repeats) for rule in RULES}
        # All means agree for the two unbiased rules; the quieter one knows it best.
        signal = {rule: draws["dreg" if rule != "stl" else "stl"].mean().abs() for rule in RULES}
        for rule in RULES:
            ratios[rule].append((signal[rule] / draws[rule].std()).item())
    return ratios


def print_near(sizes: tuple[int, ...], ratios: dict[str, list[float]]) -> None:
    """With the slope in log K."""
    print("Signal-to-noise ratio, target N(0, 0.8), guide N(0.2, 1)")
    print(f"{'K':>10}" + "".join(f"{K:>9}" for K in sizes) + f"{'slope':>8}")
    for rule, row in ratios.items():
        slope = np.polyfit(np.log(sizes), np.log(row), 1)[0]
        print(f"{rule:>10}" + "".join(f"{ratio:>9.3f}" for ratio in row) + f"{slope:>8.2f}")


def print_far(num_repeats: int) -> None:
    """A guide five units from its target, K = 10."""
    print("\nFar away: target N(2, 3), guide N(-3, 1), K = 10")
    for rule in ("pathwise", "dreg"):
        draws = gradients(rule, 10, -3.0, (2.0, 3.0), num_repeats)
        error = draws.std() / math.sqrt(num_repeats)
        print(f"{rule:>10}: mean {draws.mean():.3f} +- {error:.3f}, sd {draws.std():.2f}")


# %%
# An autoencoder
# --------------
#
# ``gradient_diagnostics`` takes a model and guide of any kind, and draws the gradient of each
# estimator some hundred times. Model and guide are apart: a tighter bound helps the one and may
# harm the other, which is why the partially importance-weighted bound trains them on two bounds.

ELBOS = {
    "ELBO, K = 64": MultiplyImportanceWeightedELBO(64, num_groups=64, max_plate_nesting=1),
    "IWAE, K = 8": ImportanceWeightedELBO(8, max_plate_nesting=1),
    "IWAE, K = 64": ImportanceWeightedELBO(64, max_plate_nesting=1),
    "IWAE-DReG, K = 8": ImportanceWeightedELBO(8, gradient="dreg", max_plate_nesting=1),
    "IWAE-DReG, K = 64": ImportanceWeightedELBO(64, gradient="dreg", max_plate_nesting=1),
    "MIWAE, 8 x 8": MultiplyImportanceWeightedELBO(64, num_groups=8, max_plate_nesting=1),
    "CIWAE, K = 64": CombinedELBO(0.5, num_particles=64, max_plate_nesting=1),
    "PIWAE, 8 x 8": PartiallyImportanceWeightedELBO(64, num_groups=8, max_plate_nesting=1),
}


class VAE(nn.Module):
    """p(x, z) and q(z | x) over binary digits, with 16 latent dims."""

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 64), nn.Tanh(), nn.Linear(64, 64))

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), and the pixels of x are independent given z."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The normal approximation of the posterior of z."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def measure(
    num_steps: tuple[int, ...], num_repeats: int, hide_bar: bool
) -> dict[int, GradientDiagnostics]:
    """Trains a network, and stops at some steps to look at its gradients."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    images = torch.bernoulli(torch.tensor(load_digits().data / 16).float())
    vae = VAE()
    elbo = ImportanceWeightedELBO(8, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.ClippedAdam({"lr": 3e-3}), elbo)
    found = {}
    for step in tqdm(range(1, num_steps[-1] + 1), disable=hide_bar):
        svi.step(images[torch.randint(len(images), (100,))])
        if step in num_steps:
            found[step] = gradient_diagnostics(
                vae.model, vae.guide, images[:50], elbos=ELBOS, num_repeats=num_repeats
            )
    return found


# %%
# The figure
# ----------


def draw_figure(
    sizes: tuple[int, ...],
    ratios: dict[str, list[float]],
    found: dict[int, GradientDiagnostics],
    output: str,
) -> None:
    """The ratio against K, and the ratios of all estimators on the autoencoder."""
    figure, axes = plt.subplots(
        1, 1 + len(found), figsize=(5 * (1 + len(found)), 4.5), layout="constrained"
    )
    for rule, row in ratios.items():
        axes[0].plot(sizes, row, marker="o", label=rule)
    axes[0].set(
        title="Guide's gradient near a normal posterior",
        xlabel="particles K",
        ylabel="signal-to-noise ratio",
        xscale="log",
        yscale="log",
    )
    axes[0].legend()
    for axis, (step, diagnostics) in zip(axes[1:], found.items(), strict=True):
        diagnostics.plot(axis)
        axis.set_title(f"Autoencoder after {step} steps")
    figure.savefig(output, dpi=120)
    print(f"\nFigure: {output}")


# %%
# All of it
# ---------


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description="Signal-to-noise ratios of gradients.")
    parser.add_argument("--smoke", action="store_true", help="few draws, to see that it runs")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="signal_to_noise.png", help="where the figure goes")
    arguments = parser.parse_args()
    sizes, num_near, num_far, num_steps, num_repeats = (
        (4, 16, 64, 256),
        20_000,
        10**5,
        (20, 2000),
        200,
    )
    if arguments.smoke:
        sizes, num_near, num_far, num_steps, num_repeats = (4, 16), 100, 100, (2, 4), 2
    torch.set_flush_denormal(True)

    ratios = ratios_near(sizes, num_near)
    print_near(sizes, ratios)
    print_far(num_far)
    found = measure(num_steps, num_repeats, arguments.no_progress_bar)
    for step, diagnostics in found.items():
        print(f"\nAutoencoder after {step} steps\n{diagnostics}")
    draw_figure(sizes, ratios, found, arguments.output)


if __name__ == "__main__":
    main()

# %%
# What was learnt
# ---------------
#
# - Near the posterior the plain gradient's ratio falls with K and the doubly reparameterised one's
#   rises, with the predicted slopes. That holds for a guide that is wider than its target, as
#   here: with the widths exchanged the largest weights rule, and ``"dreg"`` gains little from K.
# - Far from the posterior, the doubly reparameterised gradient has six times the standard
#   deviation of the plain one. Both have the same mean.
# - ``"stl"`` has the best ratio here, of a gradient that is biased for K > 1.
# - On the autoencoder, ``"dreg"`` at K = 64 gives the guide a ratio seven times that of the plain
#   gradient, for a little more time. The plain ELBO's gradient is clearer still, but it is
#   that of a looser bound. The model's gradient is the same under both rules.
