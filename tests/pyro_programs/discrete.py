"""Discrete latents that are drawn, simulators, and programs that reason about programs."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from tests.pyro_programs.program import Pair, program


@program()
def sleepy_detector() -> Pair:
    """A Bernoulli of each data point, and a score-function gradient without a baseline."""

    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            is_on = pyro.sample("is_on", dist.Bernoulli(0.3))
            pyro.sample("obs", dist.Normal(2 * is_on, 1.0), obs=data)

    def guide(data: Tensor) -> None:
        a, b = pyro.param("a", torch.tensor(1.0)), pyro.param("b", torch.tensor(-1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("is_on", dist.Bernoulli(logits=a * data + b))

    return model, guide, (torch.tensor([0.1, 2.2, 1.0]),), {}


@program(one_at_a_time=True)
def nested_speaker() -> Pair:
    """A listener who models a speaker: the speaker's utterance has the listener's beliefs."""
    meanings = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])  # utterance, state

    def speaker(state: Tensor) -> dist.Categorical:
        literal = meanings / meanings.sum(-1, keepdim=True)
        return dist.Categorical(logits=2.0 * literal[:, int(state)].clamp(min=1e-6).log())

    def model(utterance: Tensor) -> None:
        state = pyro.sample("state", dist.Categorical(torch.ones(3)))
        pyro.sample("utterance", speaker(state), obs=utterance)

    def guide(utterance: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(3))
        pyro.sample("state", dist.Categorical(logits=logits))

    return model, guide, (torch.tensor(1),), {}


@program(one_at_a_time=True)
def inclined_plane() -> Pair:
    """The time of a sliding block, from a simulator with a loop that reads its state."""

    def simulate(mu: Tensor) -> Tensor:
        acceleration = 9.8 * (math.sin(math.pi / 6) - math.cos(math.pi / 6) * mu)
        if acceleration.item() <= 0.0:
            return torch.tensor(100.0)
        time, velocity, way = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
        while way.item() < 2.0:
            velocity, way = velocity + 0.05 * acceleration, way + 0.05 * velocity
            time = time + 0.05 + 0.0 * way
        return time

    def model(times: Tensor) -> None:
        mu = pyro.sample("mu", dist.Uniform(0.0, 1.0))
        for i, time in enumerate(times):
            pyro.sample(f"obs_{i}", dist.Normal(simulate(mu), 0.2), obs=time)

    def guide(times: Tensor) -> None:
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Beta(a, 20.0))

    return model, guide, (torch.tensor([0.98, 1.05]),), {}


@program(one_at_a_time=True)
def rejection_by_simulation() -> Pair:
    """A guide that draws until a simulated summary is near the data: a loop of random length."""

    def model(summary: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("summary", dist.Normal(loc, 0.3), obs=summary)

    def guide(summary: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        attempt = 0
        while True:
            base = pyro.sample(
                f"try_{attempt}", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True}
            )
            if abs(base.item() * 0.5 + 0.5 - summary.item()) < 0.6:
                break
            attempt += 1
        pyro.sample("loc", dist.Normal(base * 0.5 + 0.5, scale))

    return model, guide, (torch.tensor(0.6),), {}


@program()
def compiled_inference() -> Pair:
    """A network proposes the latents of csis, given the observations."""
    network = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))

    def model(x1: Tensor, x2: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 5**0.5))
        pyro.sample("x1", dist.Normal(z, 2**0.5), obs=x1)
        pyro.sample("x2", dist.Normal(z, 2**0.5), obs=x2)

    def guide(x1: Tensor, x2: Tensor) -> None:
        pyro.module("network", network)
        loc, log_scale = network(torch.stack([x1, x2])).unbind()
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, guide, (torch.tensor(8.0), torch.tensor(9.0)), {}


@program()
def hyperbole() -> Pair:
    """A price, said with an affect, whose listener sums over both in a fixed table."""

    def model() -> None:
        informativeness = pyro.sample("informativeness", dist.LogNormal(0.0, 0.5))
        logits = informativeness.unsqueeze(-1) * torch.tensor([0.2, 1.0, 0.4])
        with pyro.plate("said", 4):
            said = dist.Categorical(logits=logits)
            pyro.sample("utterance", said, obs=torch.tensor([1, 1, 2, 0]))

    return model, AutoNormal(model), (), {}
