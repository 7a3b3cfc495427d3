"""Draws from a posterior, with its evidence."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_ext.infer.annealing.tempered_evidence import TemperedEvidence
from pyro_ext.infer.annealing.unconstrained_sites import to_support
from pyro_ext.tracing import Program
from pyro_ext.tracing.sites import PARTICLE_PLATE


class _Drawn(TorchDistribution):
    """A distribution whose draws are the next rows of a table.

    :param base: the distribution with the density.
    :param transform: the transform from unconstrained values to the support.
    :param rows: the unconstrained values of all draws, from the next one on.
    :param num_batch_dims: the number of dims of the rows left of their event dims.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, transform: Any, rows: Tensor, num_batch_dims: int) -> None:
        self.base, self.transform = base, transform
        self.rows, self.num_batch_dims = rows, num_batch_dims
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Drawn":
        base = self.base.expand(batch_shape)
        return _Drawn(base, self.transform, self.rows, self.num_batch_dims)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = self.batch_shape + self.rows.shape[self.num_batch_dims :]
        num_rows = shape.numel() // self.rows[0].numel()
        found: Tensor = self.transform(self.rows[:num_rows].reshape(shape))
        return found

    def log_prob(self, value: Tensor) -> Any:
        return self.base.log_prob(value)


class _DrawnSites(Messenger):
    """A handler that replaces the distributions of latent sites by their draws."""

    def __init__(self, guide: "DrawnGuide") -> None:
        super().__init__()
        self.guide = guide
        self.num_used = 1

    def _pyro_sample(self, msg: Message) -> None:
        name: Any = msg["name"]
        if msg["value"] is None and name in self.guide.positions:
            rows = self.guide.positions[name].roll(-self.guide.next_row, 0)
            transform = to_support("DrawnGuide", msg)
            msg["fn"] = _Drawn(msg["fn"], transform, rows, self.guide.num_batch_dims)

    def _pyro_post_sample(self, msg: Message) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == PARTICLE_PLATE:
                self.num_used = int(frame.size)


@dataclass(eq=False)
class DrawnGuide:
    """A guide whose draws are given. Each call takes the next ones, and begins again at the end.

    Its density is that of another guide, so it has no importance weights.

    :ivar guide: the guide that has the sites.
    :ivar positions: a dict from site name to the unconstrained values of N draws.
    :ivar num_batch_dims: the number of dims of a position left of its event dims.
    :ivar next_row: the index of the next draw.
    """

    guide: Program
    positions: Mapping[str, Tensor]
    num_batch_dims: int
    next_row: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the guide with the next draws."""
        with _DrawnSites(self) as sites:
            found = self.guide(*args, **kwargs)
        self.next_row = (self.next_row + sites.num_used) % self.num_draws
        return found

    @property
    def num_draws(self) -> int:
        """The number N of draws."""
        return len(next(iter(self.positions.values())))


@dataclass(frozen=True, repr=False)
class PosteriorDraws:
    """Draws from the posterior by sequential Monte Carlo, with the evidence.

    ``from_pyro_svi(model, draws, *args)`` exports them to ArviZ, with one chain for each run.

    :ivar evidence: the evidence, with the reasons not to trust it as its ``flags``.
    :ivar draws: a dict from the name of each latent site of the model to its draws, of shape
        ``(R, N, *plates, *event)``, for R runs with N particles each. All draws of a run have equal
        weights.
    :ivar guides: for each run, a guide with these draws, for exports. Its density is not that of
        the draws, so it is not for functions that use importance weights.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import sequential_monte_carlo
    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    >>> pyro.set_rng_seed(0)
    >>> found = sequential_monte_carlo(model, None, torch.ones(3), num_particles=64, num_runs=4)
    >>> found.draws["loc"].shape
    torch.Size([4, 64])
    """

    evidence: TemperedEvidence
    draws: dict[str, Tensor]
    guides: tuple[DrawnGuide, ...]

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.draws.items())
        return f"{type(self).__name__}({sites})\n{self.evidence!r}"
