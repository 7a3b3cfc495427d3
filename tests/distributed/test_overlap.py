import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ext.distributed.processes import current_processes
from pyro_ext.infer import EagerSVI
from tests.distributed.pool import SIZES

pytestmark = pytest.mark.long

ROWS = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def train(num_bytes, num_particles, in_turn):
    """The parameters after some steps, with the numbers of vectors sent in backward passes."""
    processes = current_processes()
    pyro.set_rng_seed(0)
    network = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    network = network.double() if num_bytes % 2 else network
    rows = ROWS.double() if num_bytes % 2 else ROWS

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", 100, subsample=x):
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    elbo = Trace_ELBO(num_particles, vectorize_particles=not in_turn, max_plate_nesting=1)
    svi = EagerSVI(model, lambda x: None, pyro.optim.SGD({"lr": 1e-3}), elbo)
    svi._bucket_bytes = num_bytes
    overlapped = []
    for step in range(6):
        if step == 4 and in_turn:
            elbo.num_particles += 1  # one backward pass more than before
        x = rows if processes is None else rows[processes.rank :: processes.size]
        svi.step(x)
        overlapped.append(svi._group.exchange.num_overlapped if processes else 0)
    return torch.cat([x.detach().flatten() for x in network.parameters()]), overlapped


@pytest.mark.parametrize("num_bytes", [100, 101, 300, 2**20])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_that_are_sent_early_are_right(pools, num_bytes, in_turn, size):
    expected, _ = train(num_bytes, 2, in_turn)
    for found, overlapped in pools(size).results(train, num_bytes, 2, in_turn):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        assert overlapped[0] == 0
        assert (max(overlapped[2:]) > 0) == (num_bytes < 2**20)
