"""Training runs whose numbers do not depend on the number of processes."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pyro_ext.distributed import DistributedNoise
from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import (
    CompiledSVI,
    EagerSVI,
    ImportanceWeightedELBO,
    JackknifeELBO,
    KLWeightedELBO,
    LinearKL,
)
from pyro_ext.nn import BayesianModule, MeanFieldGuide

NUM_DATA, BATCH_SIZE, NUM_PARTICLES, NUM_EPOCHS = 40, 8, 5, 10  # 50 steps
OPTIONS = {"max_plate_nesting": 1}


class Model(PyroModule):
    """Local latent variables, and perhaps a global one."""

    def __init__(self, has_global):
        super().__init__()
        self.has_global = has_global
        self.decoder = nn.Linear(2, 3)

    def forward(self, x):
        shift = x.new_zeros(())
        if self.has_global:
            shift = pyro.sample("shift", dist.Normal(shift, 1.0))
        with pyro.plate("data", NUM_DATA, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + shift.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, has_global):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.has_global = has_global

    def forward(self, x):
        if self.has_global:
            positive = dist.constraints.positive
            loc = pyro.param("loc", lambda: torch.randn(()).to(x.device))
            scale = pyro.param("scale", lambda: torch.rand(()).to(x.device), constraint=positive)
            pyro.sample("shift", dist.Normal(loc, scale))
        with pyro.plate("data", NUM_DATA, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def bayesian_network(device):
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
    module = BayesianModule(network, dist.Normal(0.0, 1.0))

    def model(x):
        mean = module(x[:, :2])
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(mean.squeeze(-1), 0.5), obs=x[:, 2])

    return model, MeanFieldGuide(module)


def programs(name, device):
    """A model and guide, with an objective."""
    if name == "Bayesian module":
        return *bayesian_network(device), Trace_ELBO()
    has_global = name in ("local plate", "KL weighted")
    objectives = {
        "pathwise": lambda: ImportanceWeightedELBO(NUM_PARTICLES, **OPTIONS),
        "dreg": lambda: ImportanceWeightedELBO(NUM_PARTICLES, gradient="dreg", **OPTIONS),
        "jackknife": lambda: JackknifeELBO(NUM_PARTICLES, order=1, **OPTIONS),
        "local plate": lambda: ImportanceWeightedELBO(NUM_PARTICLES, local_plate="data", **OPTIONS),
        "KL weighted": lambda: KLWeightedELBO(TraceMeanField_ELBO(), LinearKL(30)),
    }
    return Model(has_global).to(device), Guide(has_global).to(device), objectives[name]()


NAMES = ("pathwise", "dreg", "jackknife", "local plate", "KL weighted", "Bayesian module")


def loader(batch_size, data=None, drop_last=False):
    """Shuffled minibatches of the rows of this process, with ``batch_size`` rows in all."""
    processes = current_processes()
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    data = TensorDataset(rows() if data is None else data)
    sampler = DistributedSampler(data, size, rank, seed=3, drop_last=drop_last)
    return DataLoader(data, batch_size=batch_size // size, sampler=sampler)


def rows(num_rows=NUM_DATA):
    return torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0))


def make(name, is_compiled=False, device="cpu", **options):
    """An SVI with plain gradient descent, which would show a wrong scale."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, elbo = programs(name, device)
    optim = pyro.optim.SGD({"lr": 1e-4})
    if is_compiled:
        options = {"backend": "eager", "audit_every": 7, "fallback": False, **options}
        return CompiledSVI(model, guide, optim, elbo, **options)
    return EagerSVI(model, guide, optim, elbo)


def parameters():
    return {
        name: value.detach().cpu().clone()
        for name, value in sorted(pyro.get_param_store().named_parameters())
    }


def train(name, is_compiled=False, device="cpu", **options):
    """Train with the same draws for any number of processes, and return losses and parameters."""
    svi = make(name, is_compiled, device, **options)
    with DistributedNoise("data", seed=7, per_row=True):
        history = svi.run(loader(BATCH_SIZE, rows().to(device)), NUM_EPOCHS, progress_bar=False)
    return history.losses, parameters()
