"""Structures of programs, as tables of builders of (model, guide)."""

from tests.tracing.structures import plates, sites
from tests.tracing.structures.registry import REFUSED, STRUCTURES, bernoulli, structure

__all__ = ["REFUSED", "STRUCTURES", "bernoulli", "plates", "sites", "structure"]
