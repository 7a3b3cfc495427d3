"""Diagnostics for fits by SVI, and their export to ArviZ."""

from pyro_ext.diagnostics.calibration import Calibration
from pyro_ext.diagnostics.diagnose import Diagnosis, diagnose
from pyro_ext.diagnostics.from_pyro_svi import from_pyro_svi
from pyro_ext.diagnostics.loo import loo
from pyro_ext.diagnostics.simulation_based_calibration import simulation_based_calibration

__all__ = [
    "Calibration",
    "Diagnosis",
    "diagnose",
    "from_pyro_svi",
    "loo",
    "simulation_based_calibration",
]
