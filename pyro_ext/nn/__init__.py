"""Bayesian neural networks, and modules that help other modules work inside Pyro programs."""

from pyro_ext.nn.bayesian_module import BayesianModule
from pyro_ext.nn.flipout import flipout
from pyro_ext.nn.leading_dims import LeadingDims
from pyro_ext.nn.local_reparameterization import local_reparameterization
from pyro_ext.nn.mean_field_guide import MeanFieldGuide

__all__ = [
    "BayesianModule",
    "LeadingDims",
    "MeanFieldGuide",
    "flipout",
    "local_reparameterization",
]
