"""Reasons not to trust an estimate of the evidence."""

from typing import Any

from torch import Tensor

from pyro_ext.ops import MIN_DRAWS
from pyro_ext.tracing.failures import data_points

#: The effective number of draws below which a standard error says little.
MIN_ESS = 5
#: The standard error, in nats, above which the delta method does not hold.
MAX_STD_ERROR = 0.5


def is_heavy(evidence: Any) -> Tensor:
    """Return for which data points a few draws dominate the estimate, by Pareto k.

    :param evidence: an :class:`~pyro_ext.infer.Evidence`.
    """
    # If the weights differ only by rounding, their tail has no meaning.
    found: Tensor = (evidence.pareto_k > 0.7) & (evidence.ess < 0.99 * evidence.num_samples)
    return found & (evidence.num_samples >= MIN_DRAWS)


def weight_flags(evidence: Any) -> dict[str, str]:
    """Return the reasons not to trust an estimate that the weights show, by name.

    :param evidence: an :class:`~pyro_ext.infer.Evidence`.
    """
    few = evidence.ess < min(MIN_ESS, evidence.num_samples / 2)
    wide = ~(evidence.std_error <= MAX_STD_ERROR)  # NaN with one draw
    reasons = {
        "pareto_k": (is_heavy(evidence), "Pareto k is above 0.7"),
        "ess": (few, f"the effective sample size is below {MIN_ESS}"),
        "std_error": (wide, f"the standard error is above {MAX_STD_ERROR} nats or unknown"),
    }
    return {
        name: f"{reason}{data_points(where)}."
        for name, (where, reason) in reasons.items()
        if where.any()
    }
