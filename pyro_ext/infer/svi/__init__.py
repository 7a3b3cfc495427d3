"""SVI with steps that run as compiled graphs, and a training loop."""

from pyro_ext.infer.svi.capture.report import CaptureReport, GraphRecord
from pyro_ext.infer.svi.compile_elbo import compile_elbo
from pyro_ext.infer.svi.compiled_svi import CompiledSVI
from pyro_ext.infer.svi.eager_svi import EagerSVI
from pyro_ext.infer.svi.history import EarlyStopping, TrainingHistory

__all__ = [
    "CaptureReport",
    "CompiledSVI",
    "EagerSVI",
    "EarlyStopping",
    "GraphRecord",
    "TrainingHistory",
    "compile_elbo",
]
