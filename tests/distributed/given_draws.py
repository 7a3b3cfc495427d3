"""Programs whose draws are given, so that several processes and one compute the same numbers."""

import pyro
import pyro.distributions as dist
import torch

from pyro_ext._random_states import random_states, seed_all, set_random_states
from pyro_ext.distributed.streams import seed_of

X = torch.linspace(-2.0, 2.0, 23)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    return z.sum(-1)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


class InTurns:
    """A guide with the random numbers of one process after the other, as in a round of a group."""

    def __init__(self, guide, size, checked_call=2):
        pyro.set_rng_seed(0)
        seed = int(torch.randint(2**62, ()))
        self.guide, self.size, self.states, self.calls = guide, size, [], 0
        self.checked_call = checked_call
        for rank in range(size):
            seed_all(seed_of(seed, rank))
            self.states.append(random_states())

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.checked_call:  # the check of the first chunk
            return self.guide(*args)
        rank = (self.calls - 1 - (0 < self.checked_call < self.calls)) % self.size
        set_random_states(self.states[rank])
        self.guide(*args)
        self.states[rank] = random_states()


def row_model(x, i):
    scale = pyro.param("scale", lambda: torch.rand(()) + 1)
    pyro.sample("outside", dist.Normal(0.0, scale), obs=torch.tensor(0.5))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def row_guide(x, i):
    torch.manual_seed(int(i[0]))  # the draws belong to the first row
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def plate_model():
    pyro.sample("outside", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    with pyro.plate("rows", len(X)) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[i])


def plate_guide():
    with pyro.plate("rows", len(X)) as i:
        torch.manual_seed(int(i[0]))
        pyro.sample("z", dist.Normal(X[i] / 2, 0.8))


def figures(found):
    """The tensors of an Evidence or of an Expectation, as bytes."""
    values = vars(found)
    if "history" in values:
        values = {**values, **{f"history {k}": v for k, v in vars(values["history"]).items()}}
    found = {}
    for name, value in values.items():
        for order, x in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(x, torch.Tensor):
                found[f"{name} {order}"] = x.shape, x.numpy().tobytes()
            elif isinstance(x, (int, float, tuple)):
                found[f"{name} {order}"] = x
    return found
