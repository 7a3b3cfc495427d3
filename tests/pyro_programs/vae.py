"""Autoencoders and topic models with networks."""

from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.cevae import CEVAE
from torch import Tensor, nn

from tests.pyro_programs.program import Pair, program

D, H, L = 6, 8, 2


def net(*sizes: int) -> nn.Sequential:
    """A network with a softplus between its linear layers."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def normal(x: Tensor) -> dist.TorchDistribution:
    """A Normal whose locs and log scales are the two halves of a network's output."""
    loc, log_scale = x.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = net(L, H, D), net(D, H, 2 * L)

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], L)))
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            probs = self.decoder(z).sigmoid()
            pyro.sample("obs", dist.Bernoulli(probs).to_event(1), obs=x.reshape(-1, D))
            return probs

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", normal(self.encoder(x)))


@program()
def vae() -> Pair:
    module = VAE()
    return module.model, module.guide, (torch.rand(5, D).round(),), {}


@program()
def vae_minibatch() -> Pair:
    decoder, encoder = net(L, H, D), net(D, H, 2 * L)
    data = torch.randn(20, D)

    def model(rows: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", 20, subsample=rows):
            batch = data[rows]
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([L]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=batch)

    def guide(rows: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", 20, subsample=rows):
            pyro.sample("z", normal(encoder(data[rows])))

    return model, guide, (torch.tensor([1, 4, 7]),), {}


@program(one_at_a_time=True)
def vae_convolutional() -> Pair:
    decoder = nn.Sequential(nn.Linear(L, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 1, 3, 1, 1))
    encoder = nn.Sequential(nn.Conv2d(1, 2, 4), nn.Flatten(), nn.Linear(2, 2 * L))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("images", len(x)):
            pyro.sample("z", normal(encoder(x)))

    return model, guide, (torch.rand(3, 1, 4, 4).round(),), {}


class SSVAE(nn.Module):
    """Digits y, partly observed, and styles z: the networks take both in one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.to_y, self.to_z = net(L + 3, H, D), net(D, H, 3), net(D + 3, H, 2 * L)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data"):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), L), 1.0).to_event(1))
            prior = xs.new_ones(len(xs), 3) / 3.0
            ys = pyro.sample("y", dist.OneHotCategorical(prior), obs=ys)
            shape = torch.broadcast_shapes(zs.shape[:-1], ys.shape[:-1])
            joint = torch.cat([zs.expand(*shape, L), ys.expand(*shape, 3)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(joint)).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(self.to_y(xs).softmax(-1)))
            joint = torch.cat([xs.expand(*ys.shape[:-1], D), ys], -1)
            pyro.sample("z", normal(self.to_z(joint)))


def enumerated_in_guide() -> Any:
    return pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)


@program(enumerated=True, elbo=enumerated_in_guide)
def ss_vae() -> Pair:
    module = SSVAE()
    guide = pyro.infer.config_enumerate(module.guide, "parallel", expand=True)
    return module.model, guide, (torch.rand(4, D).round(),), {}


@program()
def ss_vae_sampled() -> Pair:
    module = SSVAE()
    return module.model, module.guide, (torch.rand(4, D).round(),), {}


@program()
def conditional_vae() -> Pair:
    """The baseline's prediction is an input of the prior, of the recognition and of the decoder."""
    prior, recognise = net(2 * D, H, 2 * L), net(2 * D, H, 2 * L)
    generate, guess = net(L, H, D), net(D, D)

    def model(xs: Tensor, ys: Tensor | None = None) -> Tensor:
        for name, module in (("prior", prior), ("generation", generate)):
            pyro.module(name, module)
        with pyro.plate("data"):
            y_hat = guess(xs).sigmoid().detach()
            zs = pyro.sample("z", normal(prior(torch.cat([xs, y_hat], -1))))
            probs = generate(zs).sigmoid()
            if ys is not None:
                mask = ys != -1
                pyro.sample(
                    "y", dist.Bernoulli(probs, validate_args=False).mask(mask).to_event(1), obs=ys
                )
            return probs

    def guide(xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data"):
            pyro.module("recognition", recognise)
            y = guess(xs).sigmoid().detach() if ys is None else ys
            pyro.sample("z", normal(recognise(torch.cat([xs, y], -1))))

    ys = torch.rand(4, D).round()
    ys[:, 0] = -1
    return model, guide, (torch.rand(4, D).round(), ys), {}


@program()
def cevae() -> Pair:
    module = CEVAE(feature_dim=3, latent_dim=L, hidden_dim=H, num_layers=2)
    x, t = torch.randn(6, 3), torch.rand(6).round()
    return module.model, module.guide, (x, t, torch.rand(6).round()), {"size": 6}


@program(enumerated=True, elbo=enumerated_in_guide)
def scanvi() -> Pair:
    """Counts x, labels y that only some cells have, an embedding z2 and a scale l."""
    to_z1, to_x, to_y = net(L + 3, H, 2 * L), net(L, H, D), net(L, H, 3)
    to_z2, to_l, to_z1_first = net(L + 3, H, 2 * L), net(D, H, 2), net(D, H, 2 * L)
    networks = nn.ModuleList([to_z1, to_x, to_y, to_z2, to_l, to_z1_first])

    def cat(z: Tensor, y: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        return torch.cat([z.expand(*shape, L), y.expand(*shape, 3)], -1)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", networks)
        theta = pyro.param("theta", torch.ones(D), constraint=dist.constraints.positive)
        with pyro.plate("batch", len(x)), pyro.poutine.scale(scale=0.1):
            z1 = pyro.sample("z1", dist.Normal(0, x.new_ones(L)).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(3)), obs=y)
            z2 = pyro.sample("z2", normal(to_z1(cat(z1, y))))
            size = pyro.sample("l", dist.LogNormal(0.0, x.new_ones(1)).to_event(1))
            mu = to_x(z2).softmax(-1) * size
            counts = dist.NegativeBinomial(theta, logits=(mu + 1e-4).log() - theta.log())
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", networks)
        with pyro.plate("batch", len(x)), pyro.poutine.scale(scale=0.1):
            z2 = pyro.sample("z2", normal(to_z1_first(x.log1p())))
            loc, scale = to_l(x.log1p()).chunk(2, -1)
            pyro.sample("l", dist.LogNormal(loc, scale.exp()).to_event(1))
            posterior = dist.OneHotCategorical(logits=to_y(z2))
            y = pyro.sample("y", posterior, infer={"enumerate": "parallel"})
            pyro.sample("z1", normal(to_z2(cat(z2, y))))

    return model, guide, (torch.rand(4, D).mul(9).floor(),), {}


@program(one_at_a_time=True)
def prod_lda() -> Pair:
    """Documents as bags of words, with BatchNorm and dropout in both networks."""
    vocabulary, topics = 12, 3
    beta = nn.Linear(topics, vocabulary, bias=False)
    decoder = nn.Sequential(nn.Dropout(0.2), beta, nn.BatchNorm1d(vocabulary, affine=False))
    encoder = nn.Sequential(net(vocabulary, H, H), nn.Softplus(), nn.Dropout(0.2))
    heads = nn.Linear(H, 2 * topics)
    norm = nn.BatchNorm1d(2 * topics, affine=False)

    def model(docs: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("documents", docs.shape[0]):
            loc = docs.new_zeros((docs.shape[0], topics))
            logtheta = pyro.sample("logtheta", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            probs = decoder(logtheta.softmax(-1)).softmax(-1)
            total = int(docs.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, probs), obs=docs)

    def guide(docs: Tensor) -> None:
        pyro.module("encoder", nn.ModuleList([encoder, heads]))
        with pyro.plate("documents", docs.shape[0]):
            loc, log_variance = norm(heads(encoder(docs))).chunk(2, -1)
            pyro.sample("logtheta", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))

    return model, guide, (dist.Multinomial(20, torch.ones(12)).sample((5,)),), {}
