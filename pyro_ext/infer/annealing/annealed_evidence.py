from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_ext.infer.annealing.flags import MIN_ACCEPTANCE, gap_flags, start_flags
from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.tracing.failures import data_points


@dataclass(frozen=True, repr=False)
class AnnealedEvidence(Evidence):
    """The evidence from annealed importance sampling.

    It has the attributes of :class:`Evidence`, and the attributes below. ``num_samples`` is the
    number of chains.

    :ivar temperatures: the inverse temperatures, from 0 to 1.
    :ivar acceptance: the mean acceptance probability of the transitions, over chains and over all
        inverse temperatures except the first and the last. It is NaN if there are only two inverse
        temperatures.
    :ivar from_prior: the evidence of runs from the prior, with which a guide's evidence is
        compared; None without this check.
    :ivar upper: an estimate from above, in nats, from reverse chains that start at an exact sample;
        None without such a sample. The probability that this estimate lies more than b below log
        p(x) is at most e^-b.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro_ext.infer import annealed_importance_sampling
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))
    >>> found = annealed_importance_sampling(model, num_temperatures=5, num_chains=8)
    >>> found.temperatures[0], found.temperatures[-1], found.num_samples, found.upper
    (0.0, 1.0, 8, None)
    """

    temperatures: tuple[float, ...]
    acceptance: Tensor
    upper: Tensor | None
    from_prior: Evidence | None = None

    @property
    def flags(self) -> dict[str, str]:
        """Reasons not to trust the estimate, by a short name; empty if none is known.

        Beside those of :class:`Evidence`, there are ``acceptance`` (below 0.3 on average), ``gap``
        (``upper`` is higher than the evidence, by more than 0.1 nats and noise explain) and
        ``prior`` (chains from the prior find more evidence, so the guide misses a part of the
        posterior).
        """
        flags = super().flags
        stuck = self.acceptance < MIN_ACCEPTANCE
        if stuck.any():
            flags["acceptance"] = (
                f"Fewer than {MIN_ACCEPTANCE:.0%} of the transitions are accepted"
                f"{data_points(stuck)}. Use more leapfrog steps, or reparameterise the model."
            )
        flags |= gap_flags(self, self.upper, "Use more temperatures.")
        if self.from_prior is not None:
            flags |= start_flags(self, self.from_prior, "guide")
        return flags

    def to_dataset(self) -> Any:
        """Return the dataset of :meth:`Evidence.to_dataset` with ``acceptance`` and ``upper``.

        ``upper`` is left out if it is None.
        """
        dataset = super().to_dataset()
        plates = dataset["log_evidence"].dims
        dataset["acceptance"] = (plates, self.acceptance.cpu().numpy())
        if self.upper is not None:
            dataset["upper"] = (plates, self.upper.cpu().numpy())
        return dataset

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.upper is not None:
            lines.append(f"  upper          {self.upper.mean():.4f} (reverse chains)")
        mean, smallest = self.acceptance.mean(), self.acceptance.min()
        lines.append(f"  acceptance     {mean:.2f} (smallest {smallest:.2f})")
        return "\n".join(lines)
