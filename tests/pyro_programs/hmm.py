"""Hidden Markov models with enumerated states: the eight shapes of Pyro's hmm example."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from tests.pyro_programs.program import Pair, masked, program
from tests.pyro_programs.vae import net

K, D = 4, 2
PARALLEL: Any = {"enumerate": "parallel"}


def two_plates() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=2)


def one_plate() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def is_probability(msg: Any) -> bool:
    return str(msg["name"]).startswith("probs_")


def pair(model: Callable[..., None]) -> Pair:
    """The model with a point estimate of its probabilities, and three ragged sequences."""
    guide = AutoDelta(poutine.block(model, expose_fn=is_probability))
    sequences, lengths = torch.rand(3, 4, D).round(), torch.tensor([4, 2, 3])
    return model, guide, (sequences, lengths), {}


def transitions(size: int, name: str = "probs_x") -> Tensor:
    return pyro.sample(name, dist.Dirichlet(0.9 * torch.eye(size) + 0.1).to_event(1))


def emissions(*shape: int) -> Tensor:
    return pyro.sample("probs_y", dist.Beta(1.0, 2.0).expand(shape).to_event(len(shape)))


@program(enumerated=True, one_at_a_time=True, elbo=one_plate)
def hmm_0() -> Pair:
    def model(sequences: Tensor, lengths: Tensor) -> None:
        probs_x, probs_y = transitions(K), emissions(K, D)
        tones = pyro.plate("tones", D, dim=-1)
        for i in map(int, pyro.plate("sequences", len(sequences))):
            x: Any = 0
            for t in pyro.markov(range(int(lengths[i]))):
                x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                with tones:
                    y = dist.Bernoulli(probs_y[x.squeeze(-1)])
                    pyro.sample(f"y_{i}_{t}", y, obs=sequences[i, t])

    return pair(model)


@program(enumerated=True, one_at_a_time=True, elbo=two_plates)
def hmm_1() -> Pair:
    def model(sequences: Tensor, lengths: Tensor) -> None:
        probs_x, probs_y = transitions(K), emissions(K, D)
        tones = pyro.plate("tones", D, dim=-1)
        with pyro.plate("sequences", len(sequences), 2, dim=-2) as batch:
            x: Any = 0
            for t in pyro.markov(range(int(lengths[batch].max()))):
                with masked((t < lengths[batch]).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones:
                        y = dist.Bernoulli(probs_y[x.squeeze(-1)])
                        pyro.sample(f"y_{t}", y, obs=sequences[batch, t])

    return pair(model)


@program(enumerated=True, one_at_a_time=True, elbo=two_plates)
def hmm_2() -> Pair:
    """Each tone depends on its own last value."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        probs_x, probs_y = transitions(K), emissions(K, 2, D)
        tones = pyro.plate("tones", D, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            x: Any = 0
            y: Any = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with masked((t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones as tone:
                        fn = dist.Bernoulli(probs_y[x, y, tone])
                        y = pyro.sample(f"y_{t}", fn, obs=sequences[batch, t]).long()

    return pair(model)


@program(enumerated=True, one_at_a_time=True, elbo=two_plates)
def hmm_3() -> Pair:
    """Two chains of states, independent of each other."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        probs_w, probs_x = transitions(2, "probs_w"), transitions(2)
        probs_y = emissions(2, 2, D)
        tones = pyro.plate("tones", D, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            w: Any = 0
            x: Any = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with masked((t < lengths).unsqueeze(-1)):
                    w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with tones as tone:
                        fn = dist.Bernoulli(probs_y[w, x, tone])
                        pyro.sample(f"y_{t}", fn, obs=sequences[batch, t])

    return pair(model)


@program(enumerated=True, one_at_a_time=True, elbo=two_plates)
def hmm_4() -> Pair:
    """Two chains, of which one drives the other."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        probs_w = transitions(2, "probs_w")
        concentration = (0.9 * torch.eye(2) + 0.1).expand(2, 2, 2)
        probs_x = pyro.sample("probs_x", dist.Dirichlet(concentration).to_event(2))
        probs_y = emissions(2, 2, D)
        tones = pyro.plate("tones", D, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            w = x = torch.tensor(0)
            for t in pyro.markov(range(int(lengths.max()))):
                with masked((t < lengths).unsqueeze(-1)):
                    w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]), infer=PARALLEL)
                    fn = dist.Categorical(Vindex(probs_x)[w, x])
                    x = pyro.sample(f"x_{t}", fn, infer=PARALLEL)
                    with tones as tone:
                        y = dist.Bernoulli(probs_y[w, x, tone])
                        pyro.sample(f"y_{t}", y, obs=sequences[batch, t])

    return pair(model)


class Tones(nn.Module):
    """The logits of all tones, from the state and the last tones."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_y = nn.Linear(K, D), net(D, 4, D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one_hot = y.new_zeros((*x.shape[:-1], K)).scatter_(-1, x, 1)
        return self.from_x(one_hot) + self.from_y(y)


@program(enumerated=True, one_at_a_time=True, elbo=two_plates)
def hmm_5() -> Pair:
    tones_generator = Tones()

    def model(sequences: Tensor, lengths: Tensor) -> None:
        pyro.module("tones_generator", tones_generator)
        probs_x = transitions(K)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            x: Any = 0
            y = torch.zeros(D)
            for t in pyro.markov(range(int(lengths.max()))):
                with masked((t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer=PARALLEL)
                    with pyro.plate(f"tones_{t}", D, dim=-1):
                        fn = dist.Bernoulli(logits=tones_generator(x, y))
                        y = pyro.sample(f"y_{t}", fn, obs=sequences[batch, t])

    return pair(model)


@program(enumerated=True, elbo=two_plates)
def hmm_6() -> Pair:
    """A second-order chain, whose probabilities are parameters. The guide is empty."""

    def model(sequences: Tensor, lengths: Tensor) -> None:
        simplex = dist.constraints.simplex
        probs_x = pyro.param("p_x", torch.rand(K, K, K), constraint=simplex)
        unit = dist.constraints.unit_interval
        probs_y = pyro.param("p_y", torch.rand(K, D), constraint=unit)
        tones = pyro.plate("tones", D, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            now, before = torch.tensor(0), torch.tensor(0)
            for t in pyro.markov(range(int(lengths.max())), history=2):
                with masked((t < lengths).unsqueeze(-1)):
                    fn = dist.Categorical(Vindex(probs_x)[before, now])
                    before, now = now, pyro.sample(f"x_{t}", fn, infer=PARALLEL)
                    with tones:
                        y = dist.Bernoulli(probs_y[now.squeeze(-1)])
                        pyro.sample(f"y_{t}", y, obs=sequences[batch, t])

    return pair(model)


@program(one_at_a_time=True)
def hmm_7() -> Pair:
    """The states are summed out by the distribution, so that no site is enumerated."""
    tones_generator = Tones()

    def model(sequences: Tensor, lengths: Tensor) -> None:
        pyro.module("tones_generator", tones_generator)
        probs_x = transitions(K)
        with pyro.plate("sequences", len(sequences), dim=-1) as batch:
            y = sequences[batch]
            x = torch.arange(K).unsqueeze(-1).expand(3, 4, K, 1)
            logits = tones_generator(x, y.unsqueeze(-2).expand(3, 4, K, D))
            seen = (torch.arange(y.size(1)) < lengths.unsqueeze(-1)).unsqueeze(-1)
            emission = dist.Bernoulli(logits=logits).to_event(1).mask(seen)
            start = torch.full((K,), -float("inf"))
            start[0] = 0
            pyro.sample("y", dist.DiscreteHMM(start, probs_x.log(), emission), obs=y)

    return pair(model)


@program(enumerated=True, elbo=two_plates)
def mixed_hmm() -> Pair:
    """Groups of individuals with random effects on the transitions between two states."""
    steps = dist.Gamma(2.0, 1.0).sample((3, 2, 4))  # time, individual, group
    present = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()

    @config_enumerate
    def model() -> None:
        rate = pyro.param("rate", torch.tensor([0.5, 2.0]), constraint=dist.constraints.positive)
        theta = pyro.param("theta", torch.randn(2, 4))
        with pyro.plate("group", 4, dim=-1):
            e_g = pyro.sample("e_g", dist.Categorical(torch.tensor([0.4, 0.6])))
            with pyro.plate("individual", 2, dim=-2), masked(present):
                e_i = pyro.sample("eps_i", dist.Normal(torch.zeros(4), 1.0).to_event(1))
                logits = (theta[e_g] + e_i).unflatten(-1, (2, 2))
                y: Any = torch.tensor(0)
                for t in pyro.markov(range(3)):
                    y = pyro.sample(f"y_{t}", dist.Categorical(logits=Vindex(logits)[..., y, :]))
                    pyro.sample(f"step_{t}", dist.Gamma(2.0, rate[y]), obs=steps[t])

    def guide() -> None:
        loc = pyro.param("loc_i", torch.zeros(2, 4, 4))
        plates = pyro.plate("group", 4, dim=-1), pyro.plate("individual", 2, dim=-2)
        with plates[0], plates[1], masked(present):
            pyro.sample("eps_i", dist.Normal(loc, 0.5).to_event(1))

    return model, guide, (), {}
