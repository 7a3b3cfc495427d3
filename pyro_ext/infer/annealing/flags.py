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


def prior_flag(evidence: Evidence, from_prior: Evidence | None) -> dict[str, str]:
    """Return the flag ``prior`` if chains from the prior find more evidence than others.

    :param evidence: the estimate from chains that start at the guide.
    :param from_prior: the estimate from chains that start at the prior; None if there is none.
    """
    if from_prior is None:
        return {}
    error = (evidence.std_error.square() + from_prior.std_error.square()).sqrt()
    num_samples = min(evidence.num_samples, from_prior.num_samples)
    more = is_beyond_noise(from_prior.log_evidence - evidence.log_evidence, error, num_samples)
    if not more.any():
        return {}
    return {
        "prior": (
            f"Chains from the prior find more evidence{data_points(more)}. The guide misses a part "
            "of the posterior. Leave the guide out, or use a wider one."
        )
    }
