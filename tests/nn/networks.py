"""Networks of many kinds, and how to run them with given parameters."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from pyro_ext.nn import BayesianModule

NORMAL = dist.Normal(0.0, 0.3)


class LastOutput(nn.Module):
    """A recurrent network and a linear layer on its last output."""

    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(3, 4, batch_first=True)
        self.linear = nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    """An autoencoder whose two layers share the weights, and a scalar parameter."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.gain * self.decoder(self.encoder(x).tanh())


class GraphConvolution(nn.Module):
    """Two layers of A relu(A x W1) W2, with the normalised adjacency A as a buffer."""

    def __init__(self):
        super().__init__()
        adjacency = torch.eye(5) + torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
        degree = adjacency.sum(0)
        self.register_buffer("adjacency", adjacency / (degree * degree.unsqueeze(1)).sqrt())
        self.first = nn.Parameter(torch.randn(3, 4))
        self.second = nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        hidden = (self.adjacency @ x @ self.first).relu()
        return self.adjacency @ hidden @ self.second


class Dictionary(nn.Module):
    """An output that is a dict, with a tuple in it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, shift=0.0):
        y = self.linear(x) + shift
        return {"mean": y, "parts": (y.square(), y[..., :1])}


def convolutional(norm):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        norm,
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


#: name -> (module, shape of its input, whether it runs under vmap in training mode)
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3), True),
    "convolution": (lambda: convolutional(nn.Identity()), (5, 1, 8, 8), True),
    "batch norm without statistics": (
        lambda: convolutional(nn.BatchNorm2d(4, track_running_stats=False)),
        (5, 1, 8, 8),
        True,
    ),
    "batch norm with statistics": (lambda: convolutional(nn.BatchNorm2d(4)), (5, 1, 8, 8), False),
    "lstm": (lambda: LastOutput(nn.LSTM), (5, 6, 3), False),
    "gru": (lambda: LastOutput(nn.GRU), (5, 6, 3), False),
    "rnn": (lambda: LastOutput(nn.RNN), (5, 6, 3), False),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        (5, 3, 4),
        None,
    ),
    "tied": (Tied, (5, 3), True),
    "graph convolution": (GraphConvolution, (5, 3), True),
    "bilinear": (lambda: Square(nn.Bilinear(3, 3, 2)), (5, 3), False),
    "dictionary": (Dictionary, (5, 3), True),
}


class Square(nn.Module):
    """A module of two inputs, given the same one twice."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x, x)


def leaves(output):
    return torch.utils._pytree.tree_leaves(output)


def draw(module, leading):
    """Values for every latent site."""
    return {
        name: 0.3 * torch.randn((*leading, *module.value_of(name).shape))
        for name in module.latent_names
    }


def run(module, values, *args, **kwargs):
    return poutine.condition(module, data=values)(*args, **kwargs)


class Classifier(PyroModule):
    """A net inside of another module, whose name is then before those of the sites."""

    def __init__(self, net, prior=NORMAL, **options):
        super().__init__()
        self.net = BayesianModule(net, prior, **options)

    def forward(self, x, y=None):
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def data(shape):
    x = torch.randn(shape)
    return x, (x.flatten(1).sum(1) > 0).long()
