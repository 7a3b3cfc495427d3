"""Several processes: what they tell each other, their random numbers, and their data."""

from pyro_ext.distributed.noise import DistributedNoise
from pyro_ext.distributed.sharded_dataset import ShardedDataset

__all__ = ["DistributedNoise", "ShardedDataset"]
