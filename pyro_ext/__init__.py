"""Multi-sample variational inference for Pyro, and evidence estimates with error bars."""

__version__ = "0.1.0"
