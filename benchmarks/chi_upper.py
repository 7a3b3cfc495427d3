"""Signal-to-noise ratio of the guide's gradient under the chi upper bound.

The posterior is a standard normal in d dims. The guide is off by 0.2 in each dim, and is too wide
or too narrow. The gradient is that in its scale, with 100 particles.
"""

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import torch

from benchmarks.harness import Options, Table
from pyro_ext.infer import ChiUpperELBO, ImportanceWeightedELBO, MultiSampleELBO

NUM_PARTICLES = 100
NUM_REPLICATES = 1000
GUIDES = tuple((scale, num_dims) for scale in (1.2, 0.7) for num_dims in (1, 5, 20))


def signal_to_noise(elbo: MultiSampleELBO, start: float, num_dims: int) -> float:
    """The ratio of the mean to the standard deviation of the gradient in the scale.

    It is negative if a step would move the scale away from that of the posterior.
    """
    pyro.set_rng_seed(num_dims)
    scale = torch.full((NUM_REPLICATES, 1), start, dtype=torch.float64, requires_grad=True)
    zeros = scale.new_zeros(num_dims)

    def model() -> None:
        with pyro.plate("replicates", NUM_REPLICATES):
            pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))

    def guide() -> None:
        with pyro.plate("replicates", NUM_REPLICATES):
            pyro.sample("z", dist.Normal(zeros + 0.2, scale + zeros).to_event(1))

    (gradient,) = torch.autograd.grad(elbo.differentiable_loss(model, guide), scale)
    ratio = (gradient.mean() / gradient.std()).item()
    return ratio if start > 1 else -ratio


def estimators() -> dict[str, MultiSampleELBO]:
    """Name -> estimator, with 100 particles."""
    found: dict[str, MultiSampleELBO] = {}
    for rule in ("pathwise", "dreg"):
        found[f"IWAE, {rule}"] = ImportanceWeightedELBO(NUM_PARTICLES, rule, max_plate_nesting=1)
        for order in (1.5, 2.0, 4.0):
            elbo = ChiUpperELBO(NUM_PARTICLES, order, rule, max_plate_nesting=1)
            found[f"chi {order:g}, {rule}"] = elbo
    return found


def tables(options: Options) -> Iterator[Table]:
    """The ratios."""
    columns = ["estimator", *(f"scale {scale}, {num_dims} dims" for scale, num_dims in GUIDES)]
    title = "Signal-to-noise ratio of the gradient in the guide's scale under the chi upper bound"
    table = Table(title, columns, chart=(columns[:1], columns[-1]))
    table.rows = [
        [name, *(signal_to_noise(elbo, *guide) for guide in GUIDES)]
        for name, elbo in estimators().items()
    ]
    yield table
