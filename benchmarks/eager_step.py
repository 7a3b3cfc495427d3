"""Time of an eager ``SVI.step`` over that of Pyro's ``RenyiELBO(alpha=0)``, in one run.

    python benchmarks/eager_step.py [--device cuda] [--rounds 40]

Both train the 784-200-200-50 VAE, vectorised, under the same validation setting. The steps of the
estimators take turns, and each ratio is one of medians over the rounds. The second RenyiELBO
shows how far equal steps come apart.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.elbo import ELBO
from vae import VAE, random_images

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO


def make_step(elbo: ELBO, name: str, batch_size: int, device: torch.device) -> Callable[[], float]:
    """One training step of a fresh network, which returns its duration in seconds."""
    vae = VAE(name).to(device)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    images = random_images(batch_size, device)

    def step() -> float:
        start = time.perf_counter()
        svi.step(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Prints a table of ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    # Saturating units make denormal numbers, which slow a CPU's matrix products.
    torch.set_flush_denormal(True)

    estimators = {
        "RenyiELBO": lambda K: RenyiELBO(
            num_particles=K, vectorize_particles=True, max_plate_nesting=1
        ),
        "RenyiELBO again": lambda K: RenyiELBO(
            num_particles=K, vectorize_particles=True, max_plate_nesting=1
        ),
        "ImportanceWeightedELBO": lambda K: ImportanceWeightedELBO(K, max_plate_nesting=1),
        "JackknifeELBO, order 1": lambda K: JackknifeELBO(K, 1, max_plate_nesting=1),
        "JackknifeELBO, order 2": lambda K: JackknifeELBO(K, 2, max_plate_nesting=1),
    }
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print(f"{'validation':>10} {'B':>4} {'K':>4}  {'RenyiELBO':>10}  ratio to RenyiELBO")
    for validation in (True, False):
        for batch_size in (20, 100):
            for K in (5, 50):
                with pyro.validation_enabled(validation):
                    pyro.clear_param_store()
                    steps = {
                        name: make_step(make(K), name, batch_size, device)
                        for name, make in estimators.items()
                    }
                    for step in steps.values():
                        step(), step(), step()
                    times: dict[str, list[float]] = {name: [] for name in steps}
                    for _ in range(arguments.rounds):
                        # In a random order: a step's time depends on what ran before it.
                        for name in random.sample(list(steps), len(steps)):
                            times[name].append(steps[name]())
                base = times.pop("RenyiELBO")
                ratios = "  ".join(
                    f"{name} {statistics.median(ts) / statistics.median(base):.3f}"
                    for name, ts in times.items()
                )
                milliseconds = 1e3 * statistics.median(base)
                print(
                    f"{validation!s:>10} {batch_size:>4} {K:>4}  {milliseconds:>7.2f} ms  {ratios}"
                )


if __name__ == "__main__":
    main()
