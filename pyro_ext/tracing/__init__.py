"""The particle tracer, which runs a model and a guide for K particles and weights them."""

from pyro_ext.tracing.particles import Particles
from pyro_ext.tracing.programs import Program, Programs
from pyro_ext.tracing.tracer import ParticleTracer

__all__ = ["ParticleTracer", "Particles", "Program", "Programs"]
