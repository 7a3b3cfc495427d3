"""Estimators: ELBO classes for Pyro, and the evidence that they bound."""

from pyro_ext.infer.annealing import AnnealedEvidence, annealed_importance_sampling
from pyro_ext.infer.combined import CombinedELBO
from pyro_ext.infer.evidence import Evidence, EvidenceHistory
from pyro_ext.infer.evidence_state import EvidenceState
from pyro_ext.infer.expectation import Expectation, estimate_expectation
from pyro_ext.infer.importance_sampling import estimate_evidence
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.jackknife import JackknifeELBO
from pyro_ext.infer.kl_schedules import CyclicalKL, GeometricKL, KLSchedule, LinearKL, UniformKL
from pyro_ext.infer.kl_weighted import KLWeightedELBO
from pyro_ext.infer.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.multiply_importance_weighted import MultiplyImportanceWeightedELBO
from pyro_ext.infer.partially_importance_weighted import PartiallyImportanceWeightedELBO
from pyro_ext.infer.particles import Particles
from pyro_ext.infer.signal_to_noise import GradientDiagnostics, gradient_diagnostics
from pyro_ext.infer.svi import CompiledSVI, EagerSVI, EarlyStopping, TrainingHistory
from pyro_ext.infer.thermodynamic import ThermodynamicELBO
from pyro_ext.infer.variational_renyi import VariationalRenyiELBO

__all__ = [
    "AnnealedEvidence",
    "CombinedELBO",
    "CompiledSVI",
    "CyclicalKL",
    "EagerSVI",
    "EarlyStopping",
    "Evidence",
    "EvidenceHistory",
    "EvidenceState",
    "Expectation",
    "GeometricKL",
    "GradientDiagnostics",
    "ImportanceWeightedELBO",
    "JackknifeELBO",
    "KLSchedule",
    "KLWeightedELBO",
    "LinearKL",
    "MultiSampleELBO",
    "MultiplyImportanceWeightedELBO",
    "PartiallyImportanceWeightedELBO",
    "Particles",
    "ThermodynamicELBO",
    "TrainingHistory",
    "UniformKL",
    "VariationalRenyiELBO",
    "annealed_importance_sampling",
    "estimate_evidence",
    "estimate_expectation",
    "gradient_diagnostics",
]
