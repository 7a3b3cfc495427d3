from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_ext.infer.evidence.evidence import Evidence


@dataclass(frozen=True, repr=False)
class AnnealedEvidence(Evidence):
    """Evidence by annealed importance sampling; ``num_samples`` counts the chains.

    :ivar temperatures: the inverse temperatures, from 0 to 1.
    :ivar acceptance: the mean acceptance probability of the transitions, over all but the first
        and last inverse temperatures and over chains; NaN if there are none.
    :ivar upper: an estimate from above, by chains in reverse from an exact sample; None without.
        It lies more than b below log p(x) with probability at most e^-b.
    """

    temperatures: tuple[float, ...]
    acceptance: Tensor
    upper: Tensor | None

    def to_dataset(self) -> Any:
        """As :meth:`Evidence.to_dataset`, with ``acceptance`` and ``upper`` where there is one."""
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
