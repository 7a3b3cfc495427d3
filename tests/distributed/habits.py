"""Programs of users, and how to run them on one process or on several."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import CompiledSVI, EagerSVI

SVIS = {"eager": EagerSVI, "compiled": CompiledSVI}
KINDS = pytest.mark.parametrize("kind", SVIS)


def rank():
    return current_processes().rank if current_processes() else 0


def size():
    return current_processes().size if current_processes() else 1


def parameters():
    return {name: x.tolist() for name, x in pyro.get_param_store().items()}


def make(model, kind="eager", optim=None, guide=lambda *args: None):
    options = {"backend": "eager", "fallback": False} if kind == "compiled" else {}
    optim = optim or pyro.optim.SGD({"lr": 1e-3})
    return SVIS[kind](model, guide, optim, Trace_ELBO(), **options)


def mean(x, is_shifted=False):
    """A mean, to which a rare parameter is added."""
    loc = pyro.param("loc", torch.tensor(0.0))
    if is_shifted:
        loc = loc + pyro.param("shift", torch.tensor(1.0))
    with pyro.plate("data", 40, subsample=x):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
