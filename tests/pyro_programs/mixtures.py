"""Mixtures and topic models, with the assignments summed out or drawn."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.autoname import named
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, TraceTMC_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

from tests.pyro_programs.program import Pair, program
from tests.pyro_programs.vae import net

POSITIVE, SIMPLEX = dist.constraints.positive, dist.constraints.simplex
CLUSTERS = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])


def gaussian_mixture(data: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        assignment = pyro.sample("assignment", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)


@program(enumerated=True, one_at_a_time=True, elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1))
def gaussian_mixture_enumerated() -> Pair:
    model = config_enumerate(gaussian_mixture)
    guide = AutoDelta(poutine.block(model, expose=["weights", "locs", "scale"]))
    return model, guide, (CLUSTERS,), {}


@program(enumerated=True, one_at_a_time=True, elbo=lambda: TraceTMC_ELBO(max_plate_nesting=1))
def gaussian_mixture_tmc() -> Pair:
    """The assignments of the mixture, drawn from the prior for tensor Monte Carlo."""
    model = config_enumerate(gaussian_mixture, "parallel", expand=False, num_samples=5)
    guide = AutoNormal(poutine.block(model, expose=["weights", "locs", "scale"]))
    return model, guide, (CLUSTERS,), {}


@program(one_at_a_time=True, elbo=TraceGraph_ELBO)
def gaussian_mixture_sampled() -> Pair:
    """Assignments that are drawn, with a score-function gradient and a moving baseline."""

    def guide(data: Tensor) -> None:
        weights = pyro.param("weights_q", torch.ones(2), constraint=POSITIVE)
        pyro.sample("weights", dist.Dirichlet(weights))
        pyro.sample("scale", dist.LogNormal(pyro.param("scale_q", torch.tensor(0.0)), 0.1))
        with pyro.plate("components", 2):
            pyro.sample("locs", dist.Normal(pyro.param("locs_q", torch.tensor([0.0, 9.0])), 0.5))
        probs = pyro.param("probs_q", torch.full((len(data), 2), 0.5), constraint=SIMPLEX)
        with pyro.plate("data", len(data)):
            infer: Any = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}}
            pyro.sample("assignment", dist.Categorical(probs), infer=infer)

    return gaussian_mixture, guide, (CLUSTERS,), {}


@program(one_at_a_time=True)
def dirichlet_process() -> Pair:
    """A truncated stick-breaking prior, whose weights are a function of joint Beta draws."""
    num = 4

    def weights(beta: Tensor) -> Tensor:
        left = (1 - beta).cumprod(-1)
        return torch.nn.functional.pad(beta, (0, 1), value=1) * torch.nn.functional.pad(
            left, (1, 0), value=1
        )

    def model(data: Tensor) -> None:
        with pyro.plate("beta_plate", num - 1):
            beta = pyro.sample("beta", dist.Beta(1, 1.5))
        with pyro.plate("mu_plate", num):
            prior = dist.MultivariateNormal(torch.zeros(2), 5 * torch.eye(2))
            mu = pyro.sample("mu", prior)
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Categorical(weights(beta)))
            pyro.sample("obs", dist.MultivariateNormal(mu[z], torch.eye(2)), obs=data)

    def guide(data: Tensor) -> None:
        kappa = pyro.param("kappa", torch.ones(num - 1), constraint=POSITIVE)
        tau = pyro.param("tau", torch.randn(num, 2))
        phi = pyro.param("phi", torch.full((len(data), num), 0.25), constraint=SIMPLEX)
        with pyro.plate("beta_plate", num - 1):
            pyro.sample("beta", dist.Beta(torch.ones(num - 1), kappa))
        with pyro.plate("mu_plate", num):
            pyro.sample("mu", dist.MultivariateNormal(tau, torch.eye(2)))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Categorical(phi))

    return model, guide, (torch.randn(6, 2),), {}


WORDS, TOPICS = 5, 2
DOCUMENTS = torch.tensor([[0, 4, 2], [1, 3, 2], [0, 3, 4], [1, 4, 0]])  # words, documents


def topic_globals() -> tuple[Tensor, Tensor]:
    with pyro.plate("topics", TOPICS):
        weights = pyro.sample("topic_weights", dist.Gamma(1.0 / TOPICS, 1.0))
        words = pyro.sample("topic_words", dist.Dirichlet(torch.ones(WORDS) / WORDS))
    return weights, words


def guide_of_topics() -> None:
    weights = pyro.param("topic_weights_q", torch.ones(TOPICS), constraint=POSITIVE)
    words = pyro.param("topic_words_q", torch.ones(TOPICS, WORDS), constraint=POSITIVE)
    with pyro.plate("topics", TOPICS):
        pyro.sample("topic_weights", dist.Gamma(weights, 1.0))
        pyro.sample("topic_words", dist.Dirichlet(words))


@program(enumerated=True, one_at_a_time=True, elbo=lambda: TraceEnum_ELBO(max_plate_nesting=2))
def lda() -> Pair:
    """Topics of words summed out, topics of documents at a point that a network predicts."""
    predictor = net(WORDS, 6, TOPICS)

    def model(data: Tensor) -> None:
        weights, topic_words = topic_globals()
        with pyro.plate("documents", data.shape[1], 2) as rows:
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", data.shape[0]):
                fn = dist.Categorical(doc_topics)
                word_topics = pyro.sample("word_topics", fn, infer={"enumerate": "parallel"})
                words = dist.Categorical(topic_words[word_topics])
                pyro.sample("doc_words", words, obs=data[:, rows])

    def guide(data: Tensor) -> None:
        guide_of_topics()
        pyro.module("predictor", predictor)
        with pyro.plate("documents", data.shape[1], 2) as rows:
            counts = torch.nn.functional.one_hot(data[:, rows], WORDS).sum(0).float()
            topics = predictor(counts).softmax(-1)
            pyro.sample("doc_topics", dist.Delta(topics, event_dim=1))

    return model, guide, (DOCUMENTS,), {}


@program(one_at_a_time=True)
def lda_sampled() -> Pair:
    """Topics of words and of documents, all drawn."""

    def model(data: Tensor) -> None:
        weights, topic_words = topic_globals()
        with pyro.plate("documents", data.shape[1]):
            doc_topics = pyro.sample("doc_topics", dist.Dirichlet(weights))
            with pyro.plate("words", data.shape[0]):
                word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics))
                pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data)

    def guide(data: Tensor) -> None:
        guide_of_topics()
        topics = pyro.param("doc_topics_q", torch.ones(data.shape[1], TOPICS), POSITIVE)
        word_topics = pyro.param("word_topics_q", torch.zeros(*data.shape, TOPICS))
        with pyro.plate("documents", data.shape[1]):
            pyro.sample("doc_topics", dist.Dirichlet(topics))
            with pyro.plate("words", data.shape[0]):
                pyro.sample("word_topics", dist.Categorical(logits=word_topics))

    return model, guide, (DOCUMENTS,), {}


@program()
def named_mixture() -> Pair:
    """A site for each data point, named by ``pyro.contrib.autoname``."""

    def model(data: Tensor) -> None:
        latent = named.Object("latent")
        latent.probs.param_(torch.ones(2) / 2, constraint=SIMPLEX)
        latent.locs.param_(torch.tensor([0.0, 9.0]))
        latent.local = named.List()
        for x in data:
            local = latent.local.add()
            i = local.id.sample_(dist.Categorical(latent.probs))
            local.x.sample_(dist.Normal(latent.locs[i], 1.0), obs=x)

    def guide(data: Tensor) -> None:
        latent = named.Object("latent")
        latent.local = named.List()
        for _ in data:
            local = latent.local.add()
            local.probs.param_(torch.ones(2) / 2, constraint=SIMPLEX)
            local.id.sample_(dist.Categorical(local.probs))

    return model, guide, (CLUSTERS,), {}


@program()
def masked_mixture() -> Pair:
    """Each data point has one of two likelihoods, as a mask says."""

    def model(data: Tensor, is_wide: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(data)):
            zeros = torch.zeros(len(data))
            narrow = dist.Normal(loc + zeros, 0.5)
            wide = dist.StudentT(2.0, loc + zeros, 3.0)
            mask = is_wide.expand(narrow.batch_shape)
            pyro.sample("obs", dist.MaskedMixture(mask, narrow, wide), obs=data)

    return model, AutoNormal(model), (CLUSTERS, CLUSTERS > 5), {}
