"""Training loops that own the optimiser, and models and guides of several kinds for them."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_ext.infer import ImportanceWeightedELBO, KLWeightedELBO, compile_elbo
from tests.infer.svi.programs import Problem, images


def mlp(*sizes):
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(*sizes[1:]))


def decode(net, x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)


def encode(net, x):
    with pyro.plate("data", len(x)):
        loc, log_scale = net(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class Decoder(nn.Module):
    """A model whose parameters are in no param store."""

    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, 12)

    def forward(self, x):
        decode(self.net, x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(12, 8, 6)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        encode(self.net, self.norm(x))


class PyroDecoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(3, 8, 12)
        self.temperature = PyroParam(torch.tensor(1.5), constraint=dist.constraints.positive)

    def forward(self, x):
        temperature = self.temperature
        decode(lambda z: self.net(z) / temperature, x)


class PyroEncoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = mlp(12, 8, 6)
        self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        encode(self.net, x + self.shift)


def slope_model(x):
    loc = pyro.param("loc", torch.zeros(12))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) + loc, scale).to_event(1), obs=x)


def slope_guide(x):
    slope = pyro.param("slope", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x.sum(-1), 0.7))


def global_model(x):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(12), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


#: name -> a function that makes model and guide
PAIRS = {
    "functions": lambda: (slope_model, slope_guide),
    "nn.Module": lambda: (Decoder(), Encoder()),
    "PyroModule": lambda: (PyroDecoder(), PyroEncoder()),
    "AutoNormal": lambda: (global_model, AutoNormal(global_model)),
}


def problem(pair, elbo=lambda: ImportanceWeightedELBO(3)):
    """A function that makes a problem from one of the pairs."""
    return lambda: Problem(*PAIRS[pair](), elbo(), (images(),))


def eager(elbo):
    return elbo


def compiled(elbo, **options):
    return compile_elbo(elbo, **{"backend": "eager", "fallback": False, **options})


def params_of(module):
    """The parameters of a module, and those of the param store."""
    found = [param.unconstrained() for param in pyro.get_param_store().values()]
    return list(dict.fromkeys([*module.parameters(), *found]))


class Loop:
    """A training loop, from a seed."""

    def __init__(self, make, make_problem):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, guide, self.elbo, self.args = make_problem()
        self.losses = []
        self.start(make(self.elbo)(model, guide))

    def start(self, module):
        """Train a module from now on."""
        self.module = module
        module(*self.args)  # creates the parameters
        self.params = params_of(module)
        self.optimizer = torch.optim.Adam(self.params, lr=0.01)

    @property
    def x(self):
        return self.args[0]

    def step(self, loss):
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if isinstance(self.elbo, KLWeightedELBO):
            self.elbo.schedule.step()

    def take(self, num_steps):
        for _ in range(num_steps):
            self.step(self.module(*self.args))

    @property
    def results(self):
        """The losses and parameters so far."""
        return [torch.tensor(self.losses), *(param.detach() for param in self.params)]


def assert_same(run, make_problem, make=compiled):
    """Check that a run with Pyro's module gives the same losses and parameters.

    It returns the loop with the other module.
    """
    results = []
    for each in (eager, make):
        loop = Loop(each, make_problem)
        run(loop)
        results.append(loop.results)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert loop.module._graphs.count >= 1
    return loop
