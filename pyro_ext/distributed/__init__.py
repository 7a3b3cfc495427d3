"""Several processes: what they tell each other, and their random numbers."""

from pyro_ext.distributed.noise import DistributedNoise

__all__ = ["DistributedNoise"]
