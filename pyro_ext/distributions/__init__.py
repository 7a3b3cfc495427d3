"""Distributions. Each is a ``pyro.distributions.TorchDistribution``."""

from pyro_ext.distributions.discretized_logistic import (
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
)
from pyro_ext.distributions.normal_scale_mixture import NormalScaleMixture
from pyro_ext.distributions.rgb_discretized_logistic_mixture import RGBDiscretizedLogisticMixture

__all__ = [
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "NormalScaleMixture",
    "RGBDiscretizedLogisticMixture",
]
