"""Estimators: ELBO classes for Pyro, and estimates of the evidence."""

from pyro_ext.infer.annealing.annealed_evidence import AnnealedEvidence
from pyro_ext.infer.annealing.annealed_importance_sampling import annealed_importance_sampling
from pyro_ext.infer.annealing.posterior_draws import PosteriorDraws
from pyro_ext.infer.annealing.sequential_monte_carlo import sequential_monte_carlo
from pyro_ext.infer.annealing.tempered_evidence import TemperedEvidence
from pyro_ext.infer.bounds.chi_upper import ChiUpperELBO
from pyro_ext.infer.bounds.combined import CombinedELBO
from pyro_ext.infer.bounds.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.bounds.jackknife import JackknifeELBO
from pyro_ext.infer.bounds.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.bounds.multilevel import MultilevelELBO
from pyro_ext.infer.bounds.multiply_importance_weighted import MultiplyImportanceWeightedELBO
from pyro_ext.infer.bounds.partially_importance_weighted import PartiallyImportanceWeightedELBO
from pyro_ext.infer.bounds.tensor_monte_carlo import TensorMonteCarloELBO
from pyro_ext.infer.bounds.thermodynamic import ThermodynamicELBO
from pyro_ext.infer.bounds.variational_renyi import VariationalRenyiELBO
from pyro_ext.infer.evidence.estimate_evidence import estimate_evidence
from pyro_ext.infer.evidence.estimate_expectation import estimate_expectation
from pyro_ext.infer.evidence.evidence import Evidence, EvidenceHistory
from pyro_ext.infer.evidence.evidence_state import EvidenceState
from pyro_ext.infer.evidence.expectation import Expectation
from pyro_ext.infer.gradients.gradient_diagnostics import GradientDiagnostics
from pyro_ext.infer.gradients.signal_to_noise import gradient_diagnostics
from pyro_ext.infer.kl.kl_weighted import KLWeightedELBO
from pyro_ext.infer.kl.schedules import CyclicalKL, GeometricKL, KLSchedule, LinearKL, UniformKL
from pyro_ext.infer.svi import (
    CaptureReport,
    CompiledSVI,
    EagerSVI,
    EarlyStopping,
    GraphRecord,
    TrainingHistory,
    compile_elbo,
)
from pyro_ext.tracing.particles import Particles

__all__ = [
    "AnnealedEvidence",
    "CaptureReport",
    "ChiUpperELBO",
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
    "GraphRecord",
    "ImportanceWeightedELBO",
    "JackknifeELBO",
    "KLSchedule",
    "KLWeightedELBO",
    "LinearKL",
    "MultiSampleELBO",
    "MultilevelELBO",
    "MultiplyImportanceWeightedELBO",
    "PartiallyImportanceWeightedELBO",
    "Particles",
    "PosteriorDraws",
    "TemperedEvidence",
    "TensorMonteCarloELBO",
    "ThermodynamicELBO",
    "TrainingHistory",
    "UniformKL",
    "VariationalRenyiELBO",
    "annealed_importance_sampling",
    "compile_elbo",
    "estimate_evidence",
    "estimate_expectation",
    "gradient_diagnostics",
    "sequential_monte_carlo",
]
