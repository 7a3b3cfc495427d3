"""From a fit by SVI to ArviZ, and whether to believe it."""

from pyro_ext.diagnostics.calibration import Calibration, simulation_based_calibration
from pyro_ext.diagnostics.leave_one_out import loo
from pyro_ext.diagnostics.svi_export import from_pyro_svi
from pyro_ext.diagnostics.verdict import Diagnosis, diagnose

__all__ = [
    "Calibration",
    "Diagnosis",
    "diagnose",
    "from_pyro_svi",
    "loo",
    "simulation_based_calibration",
]
