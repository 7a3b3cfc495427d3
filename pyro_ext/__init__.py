"""Multi-sample variational inference for Pyro, and evidence that can be trusted."""

from importlib.metadata import version

__version__ = version("pyro_ext")
