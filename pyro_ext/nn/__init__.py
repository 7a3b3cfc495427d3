"""Modules that help other modules to work inside Pyro models and guides."""

from pyro_ext.nn.leading_dims import LeadingDims

__all__ = ["LeadingDims"]
