"""Models with discrete sites that are marked for enumeration, and sums of them by hand."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

X = torch.tensor([-1.3, 0.4, 1.7, 2.2, -0.6], dtype=torch.float64)
PROBS = torch.tensor([0.3, 0.7], dtype=torch.float64)
TRANSITIONS = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


def at(values, index):
    """values[..., index], with particles to the left of the plates of the index."""
    return Vindex(values)[..., index]


def guide_of_means(*_, num_states=2):
    loc = pyro.param("loc", torch.linspace(-1.0, 1.0, num_states))
    scale = pyro.param("scale", torch.full((num_states,), 0.4), dist.constraints.positive)
    pyro.sample("means", dist.Normal(loc, scale).to_event(1))


def draw_means(num_states=2):
    return pyro.sample("means", dist.Normal(torch.zeros(num_states), 1.5).to_event(1))


@config_enumerate
def mixture(x):
    means = draw_means()
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Categorical(PROBS))
        pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


def mixture_by_hand(x):
    means = draw_means()
    with pyro.plate("data", len(x)):
        log_prob = dist.Normal(means, 0.8).log_prob(x.unsqueeze(-1)) + PROBS.log()
        pyro.factor("x", log_prob.logsumexp(-1))


@config_enumerate
def one_assignment(x):
    means = draw_means()
    a = pyro.sample("a", dist.Bernoulli(PROBS[1])).long()
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


def one_assignment_by_hand(x):
    means = draw_means()
    rows = dist.Normal(means, 0.8).log_prob(x.unsqueeze(-1)).sum(-2)
    pyro.factor("x", (rows + PROBS.log()).logsumexp(-1).reshape(means.shape[:-1]))


@config_enumerate
def dependent(x):
    means = draw_means()
    a = pyro.sample("a", dist.Categorical(PROBS))
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Categorical(TRANSITIONS[a]))
        c = pyro.sample("c", dist.Categorical(TRANSITIONS[b]))
        pyro.sample("x", dist.Normal(at(means, c) + 0.3 * b, 0.8), obs=x)


def dependent_by_hand(x):
    means = draw_means()
    loc = means.unsqueeze(-2) + 0.3 * torch.arange(2.0).unsqueeze(-1)  # (..., b, c)
    log_prob = dist.Normal(loc, 0.8).log_prob(x[:, None, None])
    of_b = (log_prob + TRANSITIONS.log()).logsumexp(-1)  # (..., x, b)
    of_a = (of_b.unsqueeze(-2) + TRANSITIONS.log()).logsumexp(-1).sum(-2)  # (..., a)
    pyro.factor("x", (of_a + PROBS.log()).logsumexp(-1).reshape(means.shape[:-1]))


@config_enumerate
def markov_chain(x):
    means = draw_means()
    z = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, z), 0.8), obs=x[t])


def markov_chain_by_hand(x):
    means = draw_means()
    alpha = TRANSITIONS[0].log()
    for value in x:
        alpha = alpha + dist.Normal(means, 0.8).log_prob(value)
        total = alpha.logsumexp(-1)
        alpha = (alpha.unsqueeze(-1) + TRANSITIONS.log()).logsumexp(-2)
    pyro.factor("x", total)


@config_enumerate
def nested_plates(x):
    means = draw_means()
    with pyro.plate("groups", 2, dim=-2):
        g = pyro.sample("g", dist.Categorical(PROBS))
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Categorical(TRANSITIONS[g]))
            pyro.sample("x", dist.Normal(at(means, a), 0.8), obs=x)


@config_enumerate
def second_order(x):
    means = draw_means()
    probs = torch.tensor([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.6, 0.4]]])
    before, now = 0, 0
    for t in pyro.markov(range(len(x)), history=2):
        before, now = now, pyro.sample(f"z_{t}", dist.Categorical(Vindex(probs)[before, now]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, now), 0.8), obs=x[t])


@config_enumerate
def factorial(x):
    means = draw_means()
    w = z = 0
    for t in pyro.markov(range(len(x))):
        w = pyro.sample(f"w_{t}", dist.Categorical(TRANSITIONS[w]))
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
        pyro.sample(f"x_{t}", dist.Normal(at(means, w) - 0.5 * z, 0.8), obs=x[t])


@config_enumerate
def many_chains(x):
    means = draw_means()
    lengths = torch.tensor([3, 5])
    with pyro.plate("chains", 2, dim=-1):
        z = torch.zeros((), dtype=torch.long)
        for t in pyro.markov(range(len(x))):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITIONS[z]))
                pyro.sample(f"x_{t}", dist.Normal(at(means, z), 0.8), obs=x[t].expand(2))


@config_enumerate
def collapsed_topics(words):
    topics = pyro.sample("topics", dist.Dirichlet(torch.ones(2, 4)).to_event(1))
    with pyro.plate("documents", 3, dim=-1):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", 5, dim=-2):
            topic = pyro.sample("topic", dist.Categorical(weights))
            pyro.sample("word", dist.Categorical(Vindex(topics)[..., topic, :]), obs=words)


def guide_of_topics(words):
    topics = pyro.param("topics_q", torch.ones(2, 4) + torch.eye(4)[:2])
    pyro.sample("topics", dist.Dirichlet(topics).to_event(1))
    with pyro.plate("documents", 3, dim=-1):
        weights = pyro.param("weights_q", torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.5, 1.5]]))
        pyro.sample("weights", dist.Dirichlet(weights))


WORDS = torch.tensor([[0, 1, 2], [3, 0, 1], [1, 1, 0], [2, 3, 3], [0, 0, 2]])


@config_enumerate
def classes_of_images(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Categorical(PROBS))
        weight = pyro.param("weight", torch.tensor([[0.4, -0.2], [0.1, 0.7]]))
        pyro.sample("x", dist.Normal((z * weight[y]).sum(-1), 1.0), obs=x)


def encoder(x):
    slope = pyro.param("slope", torch.tensor([0.2, -0.3]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x.unsqueeze(-1) * slope, 0.6).to_event(1))
