"""Signal-to-noise ratio of the guide's gradient against the number of particles K.

On a conjugate model it falls as 1 / sqrt(K) for the plain gradient of the importance-weighted
bound (Rainforth et al. 2018) and rises as sqrt(K) for the doubly reparameterised one (Tucker et
al. 2019).
"""

import math
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch

from benchmarks.harness import Options, Table
from pyro_ext.infer import ImportanceWeightedELBO

NUM_REPLICATES = 2000
NUM_PARTICLES = (64, 256, 1024, 4096)


def gradients(rule: str, num_particles: int) -> torch.Tensor:
    """Independent estimates of d bound / d shift, for z ~ N(0, 1), x | z ~ N(z, 1), q(z) =
    N(x / 2 + shift, 2 / 3) at shift = 0.2, one for each replicate in a plate."""
    pyro.set_rng_seed(num_particles)
    x = torch.ones((), dtype=torch.float64)
    shift = torch.full((NUM_REPLICATES,), 0.2, dtype=torch.float64, requires_grad=True)

    def model() -> None:
        with pyro.plate("replicates", NUM_REPLICATES):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("replicates", NUM_REPLICATES):
            pyro.sample("z", dist.Normal(x / 2 + shift, math.sqrt(2 / 3)))

    elbo = ImportanceWeightedELBO(num_particles, gradient=rule, max_plate_nesting=1)
    (gradient,) = torch.autograd.grad(-elbo.differentiable_loss(model, guide), shift)
    return gradient


def signal_to_noise() -> dict[str, list[float]]:
    """Gradient rule -> the ratio for each number of particles.

    The mean, which is the same for both rules, is taken from the quieter one.
    """
    ratios: dict[str, list[float]] = {"pathwise": [], "dreg": []}
    for K in NUM_PARTICLES:
        draws = {rule: gradients(rule, K) for rule in ratios}
        mean = draws["dreg"].mean().abs()
        for rule, row in ratios.items():
            row.append((mean / draws[rule].std()).item())
    return ratios


def slope(ratios: list[float]) -> float:
    """The least-squares slope of the logarithm of the ratio in the logarithm of K."""
    log_k = torch.tensor(NUM_PARTICLES, dtype=torch.float64).log()
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    deviation = log_k - log_k.mean()
    return ((deviation * log_ratio).sum() / deviation.square().sum()).item()


def tables(options: Options) -> Iterator[Table]:
    """The ratios and their slopes."""
    columns = ["gradient", *(f"K = {K}" for K in NUM_PARTICLES), "slope in log K"]
    title = "Signal-to-noise ratio of the guide's gradient"
    table = Table(title, columns, chart=(columns[:1], columns[-1]))
    table.rows = [[rule, *ratios, slope(ratios)] for rule, ratios in signal_to_noise().items()]
    yield table
