"""Multi-sample variational inference for Pyro, and evidence that can be trusted."""

__version__ = "0.1.0"
