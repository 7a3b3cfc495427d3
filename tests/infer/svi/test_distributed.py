import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO, compile_elbo

NUM_DATA, BATCH_SIZE, NUM_PARTICLES, NUM_STEPS = 40, 8, 5, 20
OPTIONS = {"max_plate_nesting": 1}
OBJECTIVES = {
    "pathwise": (ImportanceWeightedELBO(NUM_PARTICLES, **OPTIONS), False),
    "dreg": (ImportanceWeightedELBO(NUM_PARTICLES, gradient="dreg", **OPTIONS), False),
    "jackknife": (JackknifeELBO(NUM_PARTICLES, order=1, **OPTIONS), False),
    "local plate": (ImportanceWeightedELBO(NUM_PARTICLES, local_plate="data", **OPTIONS), True),
}


class NormalOf(dist.Normal):
    """A normal distribution with given standard normal noise."""

    def __init__(self, loc, scale, noise):
        self.noise = noise
        super().__init__(loc, scale)

    def expand(self, batch_shape, _instance=None):
        return NormalOf(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class Model(PyroModule):
    def __init__(self, has_global):
        super().__init__()
        self.has_global = has_global
        self.decoder = nn.Linear(2, 3)

    def forward(self, x, noise, shared):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0)) if self.has_global else x.new_zeros(())
        with pyro.plate("data", NUM_DATA, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.decoder(z) + shift.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self, has_global):
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        if has_global:
            self.loc = nn.Parameter(torch.tensor(0.5))
        self.has_global = has_global

    def forward(self, x, noise, shared):
        if self.has_global:
            pyro.sample("shift", NormalOf(self.loc, torch.tensor(0.3), shared))
        with pyro.plate("data", NUM_DATA, subsample=x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", NormalOf(loc, log_scale.exp(), noise).to_event(1))


def train(name, rank=0, size=1, compiles=False):
    """The parameters after some steps on a share of each minibatch."""
    elbo, has_global = OBJECTIVES[name]
    if compiles:
        elbo = compile_elbo(elbo, backend="eager", fallback=False, audit_every=3)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    module = elbo(Model(has_global), Guide(has_global))
    step = DistributedDataParallel(module) if size > 1 else module
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-4)  # Adam would hide a wrong scale
    rows = slice(rank * BATCH_SIZE // size, (rank + 1) * BATCH_SIZE // size)
    for _ in range(NUM_STEPS):
        x, noise = torch.randn(BATCH_SIZE, 3), torch.randn(NUM_PARTICLES, BATCH_SIZE, 2)
        shared = torch.randn(())
        optimizer.zero_grad()
        step(x[rows], noise[:, rows], shared).backward()
        optimizer.step()
    return torch.cat([value.detach().flatten() for value in module.parameters()])


def train_all(rank, size, folder):
    """What each process runs; the first one keeps what came out."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size
    )
    found = {
        (name, compiles): train(name, rank, size, compiles)
        for name in OBJECTIVES
        for compiles in (False, True)
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    gc.collect()  # a module that outlives the group would end the process with an abort
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_take_the_steps_of_one(tmp_path):
    multiprocessing.spawn(train_all, (2, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for name, compiles in found:
        torch.testing.assert_close(found[name, compiles], train(name), rtol=0, atol=1e-5)
