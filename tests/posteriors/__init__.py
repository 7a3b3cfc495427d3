"""Models whose log evidence is known, with guides that fit and guides that do not."""

from tests.posteriors import (  # noqa: F401
    eight_schools,
    funnel,
    logistic_regression,
    regression,
    two_modes,
)
from tests.posteriors.posterior import POSTERIORS, Posterior

__all__ = ["POSTERIORS", "Posterior"]
