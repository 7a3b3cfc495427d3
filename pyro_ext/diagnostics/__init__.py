"""From a fit by SVI to ArviZ."""

from pyro_ext.diagnostics.leave_one_out import loo
from pyro_ext.diagnostics.svi_export import from_pyro_svi

__all__ = ["from_pyro_svi", "loo"]
