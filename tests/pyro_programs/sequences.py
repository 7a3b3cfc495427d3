"""State space models and programs whose number of steps is random."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from tests.pyro_programs.program import Pair, program
from tests.pyro_programs.vae import net, normal


@program()
def deep_markov_model() -> Pair:
    """Sequences of different lengths in one minibatch, with a mask and an annealed KL term."""
    transition, emit, combine = net(2, 6, 4), net(2, 6, 3), net(2 + 4, 6, 4)
    rnn = nn.RNN(3, 4, batch_first=True)
    networks = nn.ModuleList([transition, emit, combine, rnn])
    z_0, z_q_0 = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def model(x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("dmm", networks)
        z_prev = pyro.param("z_0", z_0).expand(x.size(0), 2)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                with poutine.scale(scale=annealing):
                    prior = normal(transition(z_prev)).mask(mask[:, t - 1])
                    z_t = pyro.sample(f"z_{t}", prior)
                probs = emit(z_t).sigmoid()
                seen = dist.Bernoulli(probs).mask(mask[:, t - 1 : t]).to_event(1)
                pyro.sample(f"obs_x_{t}", seen, obs=x[:, t - 1, :])
                z_prev = z_t

    def guide(x: Tensor, mask: Tensor, annealing: float = 1.0) -> None:
        pyro.module("dmm", networks)
        hidden = rnn(x.flip(1))[0].flip(1)
        z_prev = pyro.param("z_q_0", z_q_0).expand(x.size(0), 2)
        with pyro.plate("z_minibatch", len(x)):
            for t in pyro.markov(range(1, x.size(1) + 1)):
                h = hidden[:, t - 1].expand(*z_prev.shape[:-1], 4)
                posterior = normal(combine(torch.cat([z_prev, h], -1)))
                with poutine.scale(scale=annealing):
                    z_prev = pyro.sample(f"z_{t}", posterior.mask(mask[:, t - 1]))

    mask = torch.arange(4) < torch.tensor([4, 2, 3]).unsqueeze(-1)
    return model, guide, (torch.rand(3, 4, 3).round(), mask, 0.5), {}


@program(elbo=TraceGraph_ELBO)
def attend_infer_repeat() -> Pair:
    """A batch of images, each with up to two objects. A mask ends the sequence of an image."""
    draw, look, baseline = net(2, 6, 9), net(9 + 1, 6, 5), net(9 + 1, 6, 1)
    networks = nn.ModuleList([draw, look, baseline])

    def model(x: Tensor) -> None:
        pyro.module("decode", draw)
        with pyro.plate("data", len(x)):
            image, z_pres = x.new_zeros(x.shape), x.new_ones(len(x), 1)
            for t in range(2):
                prior = dist.Bernoulli(0.5 * z_pres)
                z_pres = pyro.sample(f"z_pres_{t}", prior.to_event(1))
                where = dist.Normal(x.new_zeros(len(x), 2), 1.0)
                what = pyro.sample(f"z_what_{t}", where.mask(z_pres).to_event(1))
                image = image + draw(what) * z_pres
            pyro.sample("obs", dist.Normal(image, 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("look", networks)
        with pyro.plate("data", len(x)):
            z_pres = x.new_ones(len(x), 1)
            for t in range(2):
                inputs = torch.cat([x.expand(*z_pres.shape[:-1], 9), z_pres], -1)
                out = look(inputs)
                infer: Any = {"baseline": {"baseline_value": baseline(inputs.detach()).squeeze(-1)}}
                present = dist.Bernoulli((out[..., :1].sigmoid() * z_pres).clamp(0.0, 0.99))
                z_pres = pyro.sample(f"z_pres_{t}", present.to_event(1), infer=infer)
                what = dist.Normal(out[..., 1:3], out[..., 3:].exp())
                pyro.sample(f"z_what_{t}", what.mask(z_pres).to_event(1))

    return model, guide, (torch.rand(4, 9),), {}


@program(one_at_a_time=True)
def air_recursive() -> Pair:
    """One image, and as many objects as Bernoulli draws say."""

    def model(x: Tensor) -> None:
        image, t = torch.zeros(3), 0
        while pyro.sample(f"more_{t}", dist.Bernoulli(0.4 if t < 3 else 0.0)):
            image = image + pyro.sample(
                f"object_{t}", dist.Normal(0.0, 1.0).expand([3]).to_event(1)
            )
            t += 1
        pyro.sample("x", dist.Normal(image, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logit, t = pyro.param("logit", torch.tensor(0.0)), 0
        loc = pyro.param("loc", torch.zeros(3))
        while pyro.sample(f"more_{t}", dist.Bernoulli(logit.sigmoid() if t < 3 else logit * 0)):
            pyro.sample(f"object_{t}", dist.Normal(loc, 1.0).to_event(1))
            t += 1

    return model, guide, (torch.tensor([0.5, 1.0, -0.3]),), {}


@program()
def kalman_for_loop() -> Pair:
    def model(data: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        z = torch.tensor(0.0)
        for t, y in enumerate(data):
            z = pyro.sample(f"z_{t}", dist.Normal(z + drift, 0.5))
            pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y)

    def guide(data: Tensor) -> None:
        loc = pyro.param("drift_loc", torch.tensor(0.0))
        locs = pyro.param("locs", torch.zeros(len(data)))
        pyro.sample("drift", dist.Normal(loc, 0.3))
        for t in range(len(data)):
            pyro.sample(f"z_{t}", dist.Normal(locs[t], 0.5))

    return model, guide, (torch.tensor([0.2, 0.9, 1.4, 2.2]),), {}


@program(one_at_a_time=True)
def hmm_sampled_markov() -> Pair:
    """Discrete states that are drawn, not summed out. They index a matrix."""

    def model(data: Tensor) -> None:
        rows = dist.Dirichlet(torch.ones(3)).expand([3]).to_event(1)
        transition = pyro.sample("transition", rows)
        locs = pyro.sample("locs", dist.Normal(torch.arange(3.0), 1.0).to_event(1))
        x = torch.tensor(0)
        for t in pyro.markov(range(len(data))):
            x = pyro.sample(f"x_{t}", dist.Categorical(transition[x]))
            pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=data[t])

    def guide(data: Tensor) -> None:
        concentration = pyro.param("c", torch.ones(3, 3), constraint=dist.constraints.positive)
        pyro.sample("transition", dist.Dirichlet(concentration).to_event(1))
        pyro.sample("locs", dist.Normal(pyro.param("l", torch.arange(3.0)), 0.5).to_event(1))
        logits = pyro.param("logits", torch.zeros(len(data), 3))
        for t in pyro.markov(range(len(data))):
            pyro.sample(f"x_{t}", dist.Categorical(logits=logits[t]))

    return model, guide, (torch.tensor([0.1, 0.8, 2.1, 1.9]),), {}
