"""
Training with the jackknife
============================

The gradient of the importance-weighted bound (IWAE) is a biased estimate of the gradient of
log p(x), because it is a ratio of two sums. The jackknife removes terms of this bias, without
further particles. Does it train better models?

This tutorial trains one autoencoder on six objectives with the same number of particles:

- the importance-weighted bound with doubly reparameterised gradients (DReG, Tucker et al. 2019),
- the jackknife of order 1 as published (Nowozin 2018),
- the published jackknife for the model, and the importance-weighted bound for the guide,
- nonnegative weights for the model, from the jackknife of orders 1 and 2, and the bound for the
  guide,
- the multilevel estimate, which is almost unbiased, with the same expected number of particles.

During training, it records the held-out evidence, how evenly the weights are spread, and how often
the jackknife has negative weights. ::

    python tutorials/jackknife_training.py [--data mnist.npz] [--particles 20] [--seeds 2]
        [--stages 4] [--smoke] [--no-progress-bar] [--output jackknife_training.png]
"""

# %%
import argparse
import warnings
from collections.abc import Callable
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from figure_style import label_lines, use_style
from importance_weighted_autoencoders import BATCH_SIZE, Autoencoder, load_images
from scipy.optimize import brentq
from torch import Tensor
from tqdm.auto import tqdm

from pyro_ext.infer import (
    CompiledSVI,
    ImportanceWeightedELBO,
    JackknifeELBO,
    MultilevelELBO,
    MultiSampleELBO,
    estimate_evidence,
)
from pyro_ext.ops import jackknife_derivatives

# %%
# The data and the network
# ------------------------
#
# The data and the network with one stochastic layer are those of the tutorial on
# importance-weighted autoencoders: scikit-learn's 8 x 8 digits, or MNIST in the format of Keras.

LATENT_UNITS = (50,)


# %%
# The bias of the gradient for Gamma weights
# ------------------------------------------
#
# Let the weights have a Gamma(a, 1) distribution, and let d log p / d theta be log w. The posterior
# mean of log w is digamma(a + 1). The gradient of the importance-weighted bound then has the bias
# -1 / (K a) exactly. The published jackknife of order 1 or 2 has no bias, because there are no
# further terms in 1 / K.


def print_gamma(num_draws: int) -> None:
    """Print the bias of the model's gradient with nonnegative weights."""
    pyro.set_rng_seed(0)
    sizes = (4, 8, 16, 32)
    print(f"Bias of the gradient for Gamma(a, 1) weights, from {num_draws:,} draws")
    print(f"{'':24}" + "".join(f"{f'K = {K}':>18}" for K in sizes))
    for shape in (1.0, 0.3):
        a = torch.tensor(shape, dtype=torch.float64)
        print(f"{f'a = {shape:g}, bound':24}" + "".join(f"{-1 / (K * a):>18.4f}" for K in sizes))
        for order in (1, 2):
            cells = []
            for K in sizes:
                log_w = dist.Gamma(a, 1.0).sample((K, num_draws // K)).log()
                weights = JackknifeELBO(K, order, weights="nonnegative").model_weights(log_w)
                error = (weights * (log_w - torch.digamma(a + 1))).sum(0)
                cells.append(f"{error.mean():.4f} +- {error.std() / len(error) ** 0.5:.4f}")
            print(f"{f'a = {shape:g}, order {order}':24}" + "".join(f"{x:>18}" for x in cells))


# %%
# The objectives
# --------------
#
# The multilevel estimate draws 2^J K / 2 particles, with J = 0 in most steps. The rate is chosen so
# that the expected number of particles is K.

OPTIONS = {"gradient": "dreg", "max_plate_nesting": 1}


def multilevel(num_particles: int) -> MultilevelELBO:
    """Return a multilevel estimate with a given expected number of particles."""
    first = num_particles // 2

    def excess(rate: float) -> float:
        return MultilevelELBO(first, rate=rate).expected_num_particles - num_particles

    return MultilevelELBO(first, rate=brentq(excess, 0.5, 3.0), **OPTIONS)


OBJECTIVES: dict[str, Callable[[int], MultiSampleELBO]] = {
    "IWAE-DReG": lambda K: ImportanceWeightedELBO(K, **OPTIONS),
    "JVI-1, published": lambda K: JackknifeELBO(
        K, 1, guide="jackknife", weights="published", **OPTIONS
    ),
    "JVI-1, model only": lambda K: JackknifeELBO(K, 1, weights="published", **OPTIONS),
    "JVI-1, nonnegative": lambda K: JackknifeELBO(K, 1, weights="nonnegative", **OPTIONS),
    "JVI-2, nonnegative": lambda K: JackknifeELBO(K, 2, weights="nonnegative", **OPTIONS),
    "multilevel": multilevel,
}
BASELINE = "IWAE-DReG"

# %%
# Training
# --------
#
# Training uses Adam and batches of 20 images, binarised anew at each step. Stage i = 0, 1, ... has
# 3^i epochs with a learning rate of 0.001 x 10^(-i / 7), as in Burda et al. Every objective sees
# the same images in the same order.


class Record(NamedTuple):
    """What was measured after some epochs."""

    epoch: int
    log_p: float
    effective: float
    uneven: float


def evaluate(network: Autoencoder, x: Tensor, num_samples: int) -> float:
    """Return the mean log evidence of the images, without a change of the random state."""
    state = torch.get_rng_state()
    pyro.set_rng_seed(99)
    with torch.no_grad():
        evidence = estimate_evidence(
            network.model, network.guide, x, num_samples=num_samples, chunk_size=50
        )
    torch.set_rng_state(state)
    return evidence.log_evidence.mean().item()


def spread_of_weights(network: Autoencoder, x: Tensor, num_particles: int) -> tuple[float, float]:
    """Return the mean effective sample size over K, and the share of images with f_k < 0."""
    state = torch.get_rng_state()
    with torch.no_grad():
        elbo = ImportanceWeightedELBO(num_particles, max_plate_nesting=1)
        log_w = elbo.trace_particles(network.model, network.guide, (x,)).log_w
    torch.set_rng_state(state)
    effective = 1 / log_w.softmax(0).square().sum(0) / num_particles
    is_uneven = (jackknife_derivatives(log_w, 1)[0] < 0).any(0)
    return effective.mean().item(), is_uneven.float().mean().item()


def train(
    objective: MultiSampleELBO,
    train_images: Tensor,
    test: Tensor,
    rates: list[float],
    num_samples: int,
    seed: int,
    bar: tqdm,
) -> list[Record]:
    """Train one network, and return records of a few epochs and of the last one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    network = Autoencoder(train_images.mean(0), LATENT_UNITS)
    optimizer = pyro.optim.Adam({"lr": rates[0], "eps": 1e-4})
    svi = CompiledSVI(network.model, network.guide, optimizer, objective)
    generator = torch.Generator().manual_seed(1000 + seed)
    records = []
    for epoch, rate in enumerate(rates, start=1):
        for inner in optimizer.optim_objs.values():
            inner.param_groups[0]["lr"] = rate
        for rows in torch.randperm(len(train_images), generator=generator).split(BATCH_SIZE):
            svi.step(torch.bernoulli(train_images[rows], generator=generator))
        if epoch in (1, 2, 4, 8, 13, 20, 30, len(rates)):
            is_last = epoch == len(rates)
            log_p = evaluate(network, test, num_samples if is_last else num_samples // 10)
            spread = spread_of_weights(network, test, objective.num_particles)
            records.append(Record(epoch, log_p, *spread))
        bar.update()
    return records


# %%
# The table and the figure
# ------------------------
#
# The table shows the difference to the importance-weighted bound with the same seed. The initial
# network and the images are the same, so most of the variation between seeds cancels.

Results = dict[str, list[list[Record]]]


def difference(results: Results, name: str, position: int) -> tuple[float, float]:
    """Return the mean difference of log p to the baseline at a record, and its standard error."""
    pairs = zip(results[name], results[BASELINE], strict=True)
    values = np.array([a[position].log_p - b[position].log_p for a, b in pairs])
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return values.mean(), spread / len(values) ** 0.5


def print_table(num_particles: int, results: Results, num_samples: int) -> None:
    """Print the last records, and then the differences at all records."""
    records = results[BASELINE][0]
    print(
        f"\nK = {num_particles}. Held-out log p(x) in nats per image, from {num_samples:,} draws. "
        "The effective sample size\nis that of K particles, divided by K."
    )
    print(f"{'trained on':20}{'log p':>10}{'effective size':>16}{'f_k < 0':>10}")
    for name, by_seed in results.items():
        _, log_p, effective, uneven = np.mean([records[-1] for records in by_seed], axis=0)
        print(f"{name:20}{log_p:>10.3f}{effective:>16.2f}{uneven:>10.0%}")
    print(f"\nDifference of log p to {BASELINE} after each epoch, +- standard error over seeds")
    print(f"{'trained on':20}" + "".join(f"{record.epoch:>18}" for record in records))
    for name in results:
        found = [difference(results, name, i) for i in range(len(records))]
        cells = [f"{mean:+.3f} +- {error:.3f}" for mean, error in found]
        print(f"{name:20}" + "".join(f"{cell:>18}" for cell in cells))


def draw_figure(num_particles: int, results: Results, output: str) -> None:
    """Draw the gain, the effective sample size and the share of negative weights over time."""
    use_style()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    epochs = [record.epoch for record in results[BASELINE][0]]
    for name, by_seed in results.items():
        gains = [difference(results, name, i) for i in range(len(epochs))]
        means = np.mean(by_seed, axis=0)
        left.plot(epochs, [mean for mean, _ in gains], marker="o", label=name)
        middle.plot(epochs, means[:, 2], marker="o", label=name)
        right.plot(epochs, 100 * means[:, 3], marker="o", label=name)
    left.set(
        title="The jackknife is ahead at first,\nand not at the end",
        ylabel=f"held-out log p minus {BASELINE}, nats",
    )
    left.set_ylim(bottom=max(left.get_ylim()[0], -0.3))
    middle.set(
        title="The weights become uneven",
        ylabel=f"effective sample size / {num_particles}",
    )
    right.set(
        title="Then the jackknife has\nnegative weights",
        ylabel="held-out images with f_k < 0, %",
    )
    for axis in (left, middle, right):
        axis.set(xlabel="epoch", xscale="log")
        axis.set_xticks(epochs, epochs)
        axis.xaxis.minorticks_off()
    label_lines(right)
    figure.savefig(output)
    print(f"\nFigure: {output}")


# %%
# Running the tutorial
# --------------------


def main() -> None:
    """Train, evaluate, print and draw."""
    parser = argparse.ArgumentParser(description="Training with the jackknife.")
    parser.add_argument("--data", help="an npz file with x_train and x_test; default: digits")
    parser.add_argument("--particles", type=int, nargs="+", default=[20], help="K, at least 3")
    parser.add_argument("--seeds", type=int, default=2, help="how many networks of each kind")
    parser.add_argument("--stages", type=int, default=4, help="stage i has 3^i epochs")
    parser.add_argument("--smoke", action="store_true", help="few steps, to test the script")
    parser.add_argument("--no-progress-bar", action="store_true")
    parser.add_argument("--output", default="jackknife_training.png")
    arguments = parser.parse_args()
    rates = [1e-3 * 10 ** (-i / 7) for i in range(arguments.stages) for _ in range(3**i)]
    train_images, test = load_images(arguments.data)
    test = test[:500]
    num_samples, num_draws, objectives = 5000, 2_000_000, OBJECTIVES
    if arguments.smoke:
        rates, train_images, test, num_samples = rates[:2], train_images[:60], test[:10], 100
        num_draws = 1000
        objectives = {name: OBJECTIVES[name] for name in (BASELINE, "JVI-1, nonnegative")}
    # Heavy-tailed weights are part of this experiment.
    warnings.filterwarnings("ignore", message=".*Pareto k")
    torch.set_flush_denormal(True)

    print_gamma(num_draws)
    num_fits = len(arguments.particles) * arguments.seeds * len(objectives)
    with tqdm(total=num_fits * len(rates), disable=arguments.no_progress_bar or None) as bar:
        for num_particles in arguments.particles:
            results: Results = {name: [] for name in objectives}
            for seed in range(arguments.seeds):
                for name, make in objectives.items():
                    bar.set_postfix_str(f"{name}, K = {num_particles}, seed {seed}")
                    results[name].append(
                        train(
                            make(num_particles), train_images, test, rates, num_samples, seed, bar
                        )
                    )
            print_table(num_particles, results, num_samples)
    draw_figure(num_particles, results, arguments.output)


if __name__ == "__main__":
    main()

# sphinx_gallery_thumbnail_path = "images/thumbnails/jackknife_training.png"

# %%
# Findings
# --------
#
# These are results on the 8 x 8 digits with K = 20 and two seeds:
#
# - At the end, no rule is better than the importance-weighted bound by more than 0.01 nats. The
#   published training is 0.22 nats worse, and the multilevel estimate is 0.29 nats worse.
# - In the first epochs, the jackknife of the model is ahead by 0.02 to 0.05 nats. The lead is lost
#   after 20 epochs.
# - In the meantime, the effective sample size of IWAE-DReG falls from 26 to 20 % of K. The share of
#   images for which the jackknife has a negative weight rises from 4 to 16 %. It is larger if the
#   jackknife trains the model, and largest if it also trains the guide.
#
# For more seeds, other K and MNIST, see the results in the documentation. Because of these results,
# ``JackknifeELBO`` has the gradients of the importance-weighted bound by default.
