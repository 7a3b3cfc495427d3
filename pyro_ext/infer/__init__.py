"""Estimators: ELBO classes for Pyro, and the evidence that they bound."""

from pyro_ext.infer.evidence import Evidence, estimate_evidence
from pyro_ext.infer.importance_weighted import ImportanceWeightedELBO
from pyro_ext.infer.jackknife import JackknifeELBO
from pyro_ext.infer.multi_sample_elbo import MultiSampleELBO
from pyro_ext.infer.particles import Particles

__all__ = [
    "Evidence",
    "ImportanceWeightedELBO",
    "JackknifeELBO",
    "MultiSampleELBO",
    "Particles",
    "estimate_evidence",
]
