"""Time of an eager ``SVI.step`` over that of Pyro's ``RenyiELBO(alpha=0)``, in one run.

    python benchmarks/eager_step.py [--device cuda] [--rounds 40]

Both train the 784-200-200-50 VAE, vectorised, under the same validation setting. The steps of the
estimators take turns, and each ratio is the median over the rounds of the ratios within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.elbo import ELBO
from vae import VAE, random_images

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO


def make_step(elbo: ELBO, batch_size: int, device: torch.device) -> Callable[[], float]:
    """One training step of a fresh network."""
    vae = VAE().to(device)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    images = random_images(batch_size, device)
    store = pyro.get_param_store()
    state = store.get_state()

    def step() -> float:
        nonlocal state
        store.set_state(state)
        start = time.perf_counter()
        svi.step(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        state = store.get_state()
        return elapsed

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
                        name: make_step(make(K), batch_size, device)
                        for name, make in estimators.items()
                    }
                    for step in steps.values():
                        step(), step(), step()
                    times: dict[str, list[float]] = {name: [] for name in steps}
                    for _ in range(arguments.rounds):
                        for name, step in steps.items():
                            times[name].append(step())
                base = times.pop("RenyiELBO")
                ratios = "  ".join(
                    f"{name} {statistics.median(t / b for t, b in zip(ts, base, strict=True)):.3f}"
                    for name, ts in times.items()
                )
                milliseconds = 1e3 * statistics.median(base)
                print(
                    f"{validation!s:>10} {batch_size:>4} {K:>4}  {milliseconds:>7.2f} ms  {ratios}"
                )


if __name__ == "__main__":
    main()
