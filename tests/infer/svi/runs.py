"""A VAE to train, by eager or by compiled steps."""

import pyro
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_ext.infer import CompiledSVI, EagerSVI, ImportanceWeightedELBO, KLWeightedELBO, LinearKL
from tests.infer.svi.programs import SmallVAE, images


def eager(*args, **kwargs):
    return EagerSVI(*args, **kwargs)


def compiled(*args, **kwargs):
    return CompiledSVI(*args, **kwargs, backend="eager", fallback=False)


BOTH = pytest.mark.parametrize("make_svi", [eager, compiled])


def loader(batch_size=4):
    return DataLoader(TensorDataset(images(12)), batch_size=batch_size, shuffle=True)


def make(make_svi, scheduler=False):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module = SmallVAE(nn.BatchNorm1d(8), nn.Dropout(0.2))
    optim = pyro.optim.Adam({"lr": 0.01})
    if scheduler:
        optim = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
        )
    loss = KLWeightedELBO(ImportanceWeightedELBO(1, max_plate_nesting=1), LinearKL(20), "all")
    return make_svi(module.model, module.guide, optim, loss), module
