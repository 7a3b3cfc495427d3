"""Diagnostics for fits by SVI, and their export to ArviZ."""

from pyro_ext.diagnostics.calibration import Calibration
from pyro_ext.diagnostics.compare_models import compare_models
from pyro_ext.diagnostics.diagnose import Diagnosis, diagnose
from pyro_ext.diagnostics.from_pyro_svi import from_pyro_svi
from pyro_ext.diagnostics.loo import loo
from pyro_ext.diagnostics.plot_model_comparison import plot_model_comparison
from pyro_ext.diagnostics.simulation_based_calibration import simulation_based_calibration

__all__ = [
    "Calibration",
    "Diagnosis",
    "compare_models",
    "diagnose",
    "from_pyro_svi",
    "loo",
    "plot_model_comparison",
    "simulation_based_calibration",
]
