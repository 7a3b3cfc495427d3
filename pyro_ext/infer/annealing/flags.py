"""Reasons not to trust a chain that starts at a guide."""

from scipy.special import ndtr, stdtrit
from torch import Tensor

from pyro_ext.infer.evidence.evidence import Evidence
from pyro_ext.tracing.failures import data_points

#: The acceptance below which chains hardly move.
MIN_ACCEPTANCE = 0.3
#: The number of standard errors at which two estimates of one data point differ, if the standard
#: errors come from many draws.
NUM_ERRORS = 4.0
#: The gap between estimates from both sides, in nats, that is never a reason for a flag.
MAX_GAP = 0.1


def is_beyond_noise(difference: Tensor, std_error: Tensor, num_samples: int) -> Tensor:
    """Return which data points have a difference that noise does not explain.

    :param difference: the difference of two estimates of each data point.
    :param std_error: its standard error.
    :param num_samples: the number of draws of the standard error.
    """
    # Few draws have an uncertain standard error, and many data points have a largest difference.
    level = ndtr(-NUM_ERRORS) / difference.numel()
    num_errors = -float(stdtrit(num_samples - 1, level))
    return difference > num_errors * std_error


def has_less(evidence: Evidence, other: Evidence) -> Tensor:
    """Return which data points have less evidence than in another estimate, beyond noise."""
    error = (evidence.std_error.square() + other.std_error.square()).sqrt()
    num_samples = min(evidence.num_samples, other.num_samples)
    return is_beyond_noise(other.log_evidence - evidence.log_evidence, error, num_samples)


def start_flags(from_guide: Evidence, from_prior: Evidence, start: str) -> dict[str, str]:
    """Return flags with the name of a start, if it finds what the other one misses.

    :param from_guide: the estimate from chains that start at the guide.
    :param from_prior: the estimate from chains that start at the prior.
    :param start: the start of the result, "guide" or "prior".
    """
    flags = {}
    less = has_less(from_guide, from_prior)
    if less.any():
        advice = {
            "guide": "Leave the guide out, or use a wider one.",
            "prior": "This result comes from the prior.",
        }
        flags["prior"] = (
            f"Chains from the prior find more evidence{data_points(less)}. The guide misses a part "
            f"of the posterior. {advice[start]}"
        )
    less = has_less(from_prior, from_guide)
    if start == "prior" and less.any():
        flags["guide"] = (
            f"Chains from the guide find more evidence{data_points(less)} than this result, which "
            "comes from the prior. Use more particles."
        )
    return flags


def gap_flags(evidence: Evidence, upper: Tensor | None, advice: str) -> dict[str, str]:
    """Return a flag ``gap`` if the estimate from above is higher than noise explains.

    :param evidence: the evidence.
    :param upper: the estimate from above; None if there is none.
    :param advice: the last sentence of the message.
    """
    if upper is None:
        return {}
    gap = is_beyond_noise(
        upper - evidence.log_evidence - MAX_GAP, evidence.std_error, evidence.num_samples
    )
    if not gap.any():
        return {}
    return {"gap": f"Chains from the exact sample find more evidence{data_points(gap)}. {advice}"}
